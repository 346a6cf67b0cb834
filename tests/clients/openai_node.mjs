// openai-node: what its users do.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = process.env.MODEL;
const client = new OpenAI({ baseURL: process.env.BASE_URL, maxRetries: 0 });
const short = { model, temperature: 0, max_tokens: 24 };
const fields = {
  type: "object",
  properties: { city: { enum: ["ab", "the"] } },
  required: ["city"],
  additionalProperties: false,
};

const messages = [{ role: "system", content: "be brief" }];
for (const content of ["ab", "name the name", "true"]) {
  messages.push({ role: "user", content });
  const answer = await client.chat.completions.create({ ...short, messages });
  const stream = await client.chat.completions.create({
    ...short, messages, stream: true, stream_options: { include_usage: true },
  });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
  assert.equal(text, answer.choices[0].message.content);
  messages.push(answer.choices[0].message);
}

const person = z.object({ name: z.boolean(), age: z.boolean() });
const who = [{ role: "user", content: "who?" }];
const parsed = await client.chat.completions.parse({
  ...short, max_tokens: 200, messages: who, response_format: zodResponseFormat(person, "person"),
});
person.parse(parsed.choices[0].message.parsed);

const tools = [{ type: "function", function: { name: "weather", parameters: fields } }];
const asked = { ...short, max_tokens: 200, messages: who, tools, tool_choice: "required" };
const called = await client.chat.completions.create(asked);
const [call] = called.choices[0].message.tool_calls;
assert.equal(call.function.name, "weather");
const result = { role: "tool", tool_call_id: call.id, content: "sun" };
await client.chat.completions.create({ ...short, messages: [...who, called.choices[0].message, result], tools });

const response = await client.responses.create({ model, input: "name?", temperature: 0, max_output_tokens: 24 });
let text = "";
const events = await client.responses.create({
  model, input: "name?", temperature: 0, max_output_tokens: 24, stream: true,
});
for await (const event of events) if (event.type === "response.output_text.delta") text += event.delta;
assert.equal(text, response.output_text);

await assert.rejects(client.chat.completions.create({ ...short, model: "another", messages: who }), { status: 404 });
await assert.rejects(client.chat.completions.create({ ...short, temperature: -1, messages: who }), { status: 400 });
console.log("all well");
