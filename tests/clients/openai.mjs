// OpenAI's own JavaScript client against the gateway at MUAI_URL; what it saw is printed as one line of JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.MUAI_URL}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "one two three" }];

const answer = await client.chat.completions.create({ model: "chatty", messages });

const chunks = [];
const stream = await client.chat.completions.create({
  model: "chatty",
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) chunks.push(chunk);

const embeddings = await client.embeddings.create({ model: "vectors", input: ["one", "two"] });
const models = [];
for await (const model of client.models.list()) models.push(model.id);

let error = null;
try {
  await client.chat.completions.create({ model: "chatty", messages, temperature: 9 });
} catch (caught) {
  error = { kind: caught.constructor.name, status: caught.status, code: caught.code, param: caught.param };
}

console.log(
  JSON.stringify({
    content: answer.choices[0].message.content,
    streamed: chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? "").join(""),
    numChunks: chunks.length,
    usage: chunks.at(-1).usage,
    dimensions: embeddings.data.map((one) => one.embedding.length),
    models,
    error,
  }),
);
