// Drives llama.cpp by lines: {"what":"load"|"threads"|"prefill"|"decode"|"begin"|"many","n":number} is answered with {"seconds":...}.
import {createInterface} from "node:readline";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [, , mode, file, contextSize, mmap, batch] = process.argv;
const llama = await getLlama({gpu: false, build: "never", maxThreads: 0, logLevel: LlamaLogLevel.error});
if (mode === "release") {
	process.stdout.write(`release ${llama.llamaCppRelease.release}; ${llama.systemInfo.trim()}`);
	process.exit(0);
}
let model, context, together, texts, sequence, threads, last = 5;
const work = {
	async load() {
		model = await llama.loadModel({modelPath: file, useMmap: mmap === "true"});
	},
	async threads(n) {
		await together?.dispose();
		together = texts = undefined;
		await context?.dispose();
		threads = n;
		context = await model.createContext({contextSize: Number(contextSize), batchSize: 512, threads: n});
		sequence = context.getSequence();
	},
	async prefill(n) {
		await sequence.clearHistory();
		await sequence.evaluateWithoutGeneratingNewTokens(Array.from({length: n}, (_, i) => 100 + i * 7 % 1000));
	},
	async decode(n) {
		for await (const token of sequence.evaluate([last], {temperature: 0, yieldEogToken: true})) {
			last = token;
			if (--n <= 0) break;
		}
	},
	async begin(n) {
		together ??= await model.createContext({contextSize: 256, sequences: Number(batch), batchSize: 512, threads});
		texts ??= Array.from({length: Number(batch)}, () => together.getSequence());
		await Promise.all(texts.map(async (text, i) => {
			await text.clearHistory();
			return text.evaluateWithoutGeneratingNewTokens([100 + i * 7 % 1000]);
		}));
	},
	async many(n) {
		await Promise.all(texts.map(async (text, i) => {
			let left = n;
			for await (const _ of text.evaluate([200 + i], {temperature: 0, yieldEogToken: true})) if (--left <= 0) break;
		}));
	},
};
for await (const line of createInterface({input: process.stdin})) {
	const {what, n} = JSON.parse(line);
	const start = performance.now();
	await work[what](n);
	process.stdout.write(JSON.stringify({seconds: (performance.now() - start) / 1000}) + "\n");
}
process.exit(0);
