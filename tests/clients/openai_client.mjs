// The OpenAI client of JavaScript, unchanged: node openai_client.mjs URL
import OpenAI from "openai";
import assert from "node:assert";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
assert.equal((await client.models.retrieve(model)).id, model);
const asked = { model, prompt: "def main(", max_tokens: 5, temperature: 0 };
const whole = await client.completions.create(asked);
assert.equal(whole.usage.completion_tokens, 5);
let text = "";
for await (const chunk of await client.completions.create({ ...asked, stream: true })) text += chunk.choices[0]?.text ?? "";
assert.equal(text, whole.choices[0].text);
const messages = [{ role: "user", content: "hello" }];
const chat = await client.chat.completions.create({ model, messages, max_tokens: 5, temperature: 0 });
assert.equal(chat.choices[0].message.role, "assistant");
const stream = client.chat.completions.stream({ model, messages, max_tokens: 5, temperature: 0 });
assert.equal((await stream.finalChatCompletion()).choices[0].message.content, chat.choices[0].message.content);
await assert.rejects(client.completions.create({ ...asked, n: 1000 }), (error) => error.status === 400 && error.param === "n");
await assert.rejects(client.models.retrieve("nobody"), (error) => error.status === 404);
console.log("ok");
