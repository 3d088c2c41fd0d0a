// What programs do with OpenAI's client, against a small real model.
import assert from 'node:assert/strict'
import OpenAI from 'openai'

const client = new OpenAI()
const model = 'smollm2'
const messages = [{ role: 'user', content: 'What is the capital of France?' }]

const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 20 })
assert.ok(whole.choices[0].message.content.length > 0)
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens)

let text = '', usage
const stream = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 20, stream: true, stream_options: { include_usage: true } })
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? ''
  usage = chunk.usage ?? usage
}
assert.equal(text, whole.choices[0].message.content)
assert.ok(usage.completion_tokens > 0)

const runner = client.chat.completions.stream({ model, messages, seed: 1, max_tokens: 20 })
assert.ok((await runner.finalContent()).length > 0)

const schema = { type: 'object', properties: { colour: { enum: ['red', 'green'] } }, required: ['colour'], additionalProperties: false }
const formed = await client.chat.completions.create({
  model, messages: [{ role: 'user', content: 'Name a colour as JSON.' }], max_tokens: 40,
  response_format: { type: 'json_schema', json_schema: { name: 'c', schema, strict: true } },
})
assert.ok(['red', 'green'].includes(JSON.parse(formed.choices[0].message.content).colour))

const listed = []
for await (const m of client.models.list()) listed.push(m.id)
assert.ok(listed.includes(model))

const vector = await client.embeddings.create({ model, input: 'a reef' })
assert.equal(vector.data[0].embedding.length, 576)

await assert.rejects(client.chat.completions.create({ model: 'none', messages }), e => e instanceof OpenAI.NotFoundError && e.code === 'model_not_found')
await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), e => e instanceof OpenAI.BadRequestError && e.param === 'temperature')

const abort = new AbortController()
const left = await client.chat.completions.create({ model, messages, stream: true, max_tokens: 2000 }, { signal: abort.signal })
for await (const _ of left) { abort.abort(); break }
console.log('ok')
