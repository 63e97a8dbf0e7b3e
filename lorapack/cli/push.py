"""`lorapack push`."""

from typing import TYPE_CHECKING, Any

import click

from lorapack.cli import options
from lorapack.cli.say import say

if TYPE_CHECKING:
    from lorapack.ship.push import Shipment


@click.command()
@click.argument("directory", metavar="DIR")
@click.argument("repo", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--revision", metavar="BRANCH", help="Commit to this branch, made if it is not there.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--message", default="Push with lorapack", show_default=True, help="Of the commit.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["compact", "peft"]),
    default="compact",
    show_default=True,
    help="As it is, or expanded to plain PEFT LoRA on the way.",
)
@click.option("--base", metavar="ID", help="The base model's Hub id, if the adapter names a path.")
@click.option("--license", "licence", metavar="ID", help="For the card, such as apache-2.0.  [default: as in the card]")
@click.option(
    "--prose",
    type=click.Choice(["hub", "dir"]),
    help="Whose text around lorapack's part of the card stays, the directory's or the Hub's, where both have some.",
)
@click.option("--dry-run", is_flag=True, help="Show exactly what would be sent; nothing is written anywhere.")
@options.JSON
def push(directory: str, repo: str, dry_run: bool, as_json: bool, **settings: Any) -> None:
    """Send the directory DIR, which compress or recover wrote, to REPO_ID on the Hub.

    One commit, which is there whole or not at all; what the Hub then has is compared before it is called
    done. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are respected.

    \b
    Examples:
      lorapack push smaller somebody/my-adapter-small --dry-run
      lorapack push smaller somebody/my-adapter-small --license apache-2.0
    """
    import json
    from dataclasses import asdict

    from lorapack.ship.push import Target, plan_push, push_adapter

    target = Target(repo, **settings)
    if dry_run:
        print_shipment(plan_push(directory, target), repo, as_json)
        return
    done = push_adapter(directory, target)
    if as_json:
        say(json.dumps(asdict(done), indent=1))
    elif done.changed:
        say(f"Pushed to {repo}, commit {done.commit}: {done.url}")
    else:
        say(f"{repo} has all of it, commit {done.commit}: {done.url}")


def print_shipment(shipment: "Shipment", repo: str, as_json: bool) -> None:
    import json

    from lorapack.cli.show import console, table

    sizes = {name: sent.size for name, sent in shipment.files.items()}
    if as_json:
        found = {"repo": repo, "makes": shipment.makes, "files": sizes, "unchanged": shipment.unchanged}
        found |= {"deleted": shipment.deleted, "left": shipment.left, "card": shipment.card}
        say(json.dumps(found, indent=1))
        return
    out = console()
    rows = table(f"One commit to {repo}", "file", "bytes", "")
    for name, size in sizes.items():
        rows.add_row(name, f"{size:,}", "unchanged" if name in shipment.unchanged else "sent")
    for name in shipment.deleted:
        rows.add_row(name, "", "deleted")
    out.print(rows)
    if shipment.makes:
        out.print(f"The {shipment.makes} is not there and would be made")
    if shipment.left:
        out.print(f"Not sent: {', '.join(shipment.left)}", soft_wrap=True, markup=False)
    say(f"\nREADME.md:\n\n{shipment.card}")
