// A batch by OpenAI's own JavaScript client against the gateway at MUAI_URL; what it saw is printed as one line of JSON.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: `${process.env.MUAI_URL}/v1`, apiKey: "none", maxRetries: 0 });
const numLines = Number(process.env.MUAI_LINES);
const lines = Array.from({ length: numLines }, (_, number) =>
  JSON.stringify({
    custom_id: `line-${number}`,
    method: "POST",
    url: "/v1/embeddings",
    body: { model: "vectors", input: `text ${number}` },
  }),
);

const input = await client.files.create({
  file: await toFile(Buffer.from(lines.join("\n")), "input.jsonl"),
  purpose: "batch",
});
let batch = await client.batches.create({
  input_file_id: input.id,
  endpoint: "/v1/embeddings",
  completion_window: "24h",
  metadata: { from: "node" },
});
const deadline = Date.now() + 90_000;
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status) && Date.now() < deadline) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  batch = await client.batches.retrieve(batch.id);
}
const output = await (await client.files.content(batch.output_file_id)).text();
const answers = output.trim().split("\n").map((line) => JSON.parse(line));
const listed = [];
for await (const one of client.batches.list({ limit: 1 })) listed.push(one.id);
const deleted = await client.files.delete(input.id);

console.log(
  JSON.stringify({
    status: batch.status,
    counts: batch.request_counts,
    metadata: batch.metadata,
    customIds: answers.map((one) => one.custom_id).sort(),
    statusCodes: [...new Set(answers.map((one) => one.response.status_code))],
    dimensions: [...new Set(answers.map((one) => one.response.body.data[0].embedding.length))],
    listed: listed.includes(batch.id),
    deleted: deleted.deleted,
  }),
);
