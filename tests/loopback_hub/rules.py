"""What the Hub checks of a card's metadata (validate-yaml), from its documentation of model cards."""

import re

import yaml

ID = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?$")
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
# hf.co/docs/hub/repositories-licenses
LICENCES = re.findall(
    r"\S+",
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
    """,
)
TASKS = {"text-generation", "text-classification", "summarization", "translation", "question-answering", "fill-mask"}
LANGUAGE = re.compile(r"^([a-z]{2,3}|code|multilingual)$")


def errors(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a card."""
    block = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\n|$)", card, re.DOTALL)
    if not block:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not isinstance(data, dict):
        return ["the metadata must be an object"], []
    found = []

    def each(key, fits, wanted):
        values = data.get(key, [])
        values = values if isinstance(values, list) else [values]
        wrong = [value for value in values if not (isinstance(value, str) and fits(value))]
        found.extend(f'"{key}" with value {value!r} is not valid. {wanted}' for value in wrong)

    each("license", LICENCES.__contains__, "It must be one of the Hub's licences.")
    each("base_model", ID.match, "Use a model id from the Hub.")
    each("base_model_relation", RELATIONS.__contains__, f"It must be one of {sorted(RELATIONS)}.")
    each("datasets", ID.match, "Use a dataset id from the Hub.")
    each("tags", lambda tag: 0 < len(tag) <= 64, "A tag is a short text.")
    each("language", LANGUAGE.match, "It must be an ISO 639 code.")
    each("pipeline_tag", TASKS.__contains__, "It must be one of the Hub's tasks.")
    each("library_name", bool, "It must be a text.")
    if isinstance(data.get("base_model_relation"), list) or isinstance(data.get("pipeline_tag"), list):
        found.append('"base_model_relation" and "pipeline_tag" must be texts')
    return found + list(_index(data.get("model-index", []))), []


def _index(index):
    if not isinstance(index, list):
        yield '"model-index" must be an array'
        return
    for n, model in enumerate(index):
        if not isinstance(model.get("name"), str):
            yield f'"model-index[{n}].name" is required'
        if not isinstance(model.get("results"), list) or not model["results"]:
            yield f'"model-index[{n}].results" must be an array'
            continue
        for m, result in enumerate(model["results"]):
            where = f"model-index[{n}].results[{m}]"
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result.get(part, {}).get(key), str):
                    yield f'"{where}.{part}.{key}" is required'
            if not result.get("metrics"):
                yield f'"{where}.metrics" is required'
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or metric.get("value") is None:
                    yield f'"{where}.metrics" need a type and a value'
