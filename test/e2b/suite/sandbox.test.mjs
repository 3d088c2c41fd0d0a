import { test } from 'node:test'
import assert from 'node:assert/strict'
import { Sandbox, SandboxNotFoundError, AuthenticationError } from 'e2b'
import { create, remove, template, unique } from './_node.mjs'

test('a sandbox is created, found, described and killed', async () => {
  const metadata = { mark: unique('a b/c&d=é') }
  const sbx = await create({ metadata, envs: { GREETING: 'hello' } })
  assert.match(sbx.sandboxId, /^[a-z0-9]+$/)
  assert.ok(await sbx.isRunning())
  const listed = await Sandbox.list({ query: { metadata } }).nextItems()
  assert.deepEqual(listed.map((s) => s.sandboxId), [sbx.sandboxId])
  assert.deepEqual(listed[0].metadata, metadata)
  const info = await sbx.getInfo()
  assert.equal(info.name, template)
  assert.equal(info.state, 'running')
  assert.ok(info.cpuCount >= 1 && info.memoryMB >= 128)
  assert.ok(info.endAt > info.startedAt)
  assert.deepEqual(info.lifecycle, { onTimeout: 'kill', autoResume: false })
  assert.equal((await sbx.commands.run('echo $GREETING')).stdout, 'hello\n')
  assert.equal(await sbx.kill(), true)
  assert.equal(await sbx.isRunning(), false)
  assert.equal(await Sandbox.kill(sbx.sandboxId), false)
  await assert.rejects(Sandbox.getInfo(sbx.sandboxId), SandboxNotFoundError)
  await assert.rejects(Sandbox.connect(sbx.sandboxId), SandboxNotFoundError)
})

test('lists are paged and filtered by state', async () => {
  const metadata = { group: unique('page') }
  const made = []
  for (let i = 0; i < 3; i++) made.unshift((await create({ metadata })).sandboxId)
  const pages = Sandbox.list({ query: { metadata }, limit: 2 })
  const seen = []
  while (pages.hasNext) seen.push(...(await pages.nextItems()).map((s) => s.sandboxId))
  assert.deepEqual(seen, made)
  await Sandbox.pause(made[0])
  const paused = await Sandbox.list({ query: { metadata, state: ['paused'] } }).nextItems()
  assert.deepEqual(paused.map((s) => s.sandboxId), [made[0]])
  const running = await Sandbox.list({ query: { metadata, state: ['running'] }, order: 'asc' }).nextItems()
  assert.deepEqual(running.map((s) => s.sandboxId), made.slice(1).reverse())
})

test('connecting only extends a life, setting a timeout sets it', async () => {
  const sbx = await create({ timeoutMs: 600_000 })
  const end = (await sbx.getInfo()).endAt.getTime()
  const other = await Sandbox.connect(sbx.sandboxId, { timeoutMs: 60_000 })
  assert.equal((await other.getInfo()).endAt.getTime(), end)
  await sbx.connect({ timeoutMs: 1_200_000 })
  assert.ok((await sbx.getInfo()).endAt.getTime() > end)
  await other.setTimeout(120_000)
  assert.ok((await sbx.getInfo()).endAt.getTime() < end)
  assert.equal((await other.commands.run('echo connected')).stdout, 'connected\n')
})

test('metrics are there within half a minute', async () => {
  const sbx = await create()
  const start = new Date()
  const metrics = await sbx.getMetrics()
  assert.ok(metrics.length > 0)
  for (const key of ['cpuUsedPct', 'cpuCount', 'memUsed', 'memTotal', 'diskUsed', 'diskTotal']) assert.equal(typeof metrics[0][key], 'number', key)
  const hour = 3_600_000
  assert.deepEqual(await sbx.getMetrics({ start: new Date(start - hour), end: new Date(start - hour / 2) }), [])
})

test('errors have the classes that programs catch', async () => {
  await assert.rejects(Sandbox.create('no-such-template'), /404/)
  await assert.rejects(Sandbox.create(template, { apiKey: 'e2b_' + '0'.repeat(40) }), AuthenticationError)
  await assert.rejects(Sandbox.connect('ghost'), SandboxNotFoundError)
  await assert.rejects(Sandbox.setTimeout('ghost', 1000), SandboxNotFoundError)
  await assert.rejects(Sandbox.pause('ghost'), SandboxNotFoundError)
  await assert.rejects(Sandbox.createSnapshot('ghost'), SandboxNotFoundError)
  await assert.rejects(Sandbox.fork('ghost'), SandboxNotFoundError)
  await assert.rejects(Sandbox.getMetrics('ghost'), SandboxNotFoundError)
  await assert.rejects(Sandbox.updateNetwork('ghost', {}), SandboxNotFoundError)
})

test('a sandbox made without a body timeout lives five minutes', async () => {
  const sbx = await Sandbox.create(template)
  remove(sbx.sandboxId)
  const { startedAt, endAt } = await sbx.getInfo()
  assert.equal(Math.round((endAt - startedAt) / 1000), 300)
})
