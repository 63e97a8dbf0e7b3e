// Greedy tokens from llama.cpp: {"model", "lora", "prompts": [[ids]], "count"} on standard input, [[ids]] on standard output.
import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const require = createRequire(`${process.env.NODE_MODULES}/`);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(require.resolve("node-llama-cpp")));
const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, progressLogs: false});
const model = await llama.loadModel({modelPath: asked.model});
const context = await model.createContext({
    contextSize: 256,
    threads: 1, // more only wait for each other on models this small
    sequences: asked.prompts.length,
    lora: asked.lora ? {adapters: [{filePath: asked.lora}]} : undefined,
    flashAttention: false, // it computes in float16
    experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32"
});
const answers = [];
for (const prompt of asked.prompts) {
    const sequence = context.getSequence();
    const answer = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        answer.push(token);
        if (answer.length === asked.count) break;
    }
    answers.push(answer);
    sequence.dispose();
}
console.log(JSON.stringify(answers));
