// Vercel's AI SDK over its default, the Responses API.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAI({ baseURL: process.env.BASE_URL });
const settings = { model: provider(process.env.MODEL), temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

const whole = await generateText({ ...settings, prompt: "name?" });
const stream = streamText({ ...settings, prompt: "name?" });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, whole.text);

let asked = 0;
const weather = tool({
  description: "tells the weather",
  inputSchema: z.object({ city: z.enum(["ab", "the"]) }),
  execute: async () => { asked += 1; return "sun"; },
});
await generateText({
  ...settings, maxOutputTokens: 200, prompt: "weather?", tools: { weather }, toolChoice: "required", stopWhen: stepCountIs(2),
});
assert.ok(asked > 0);
console.log("all well");
