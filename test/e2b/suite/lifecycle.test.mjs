import { test } from 'node:test'
import assert from 'node:assert/strict'
import { Sandbox, SandboxNotFoundError } from 'e2b'
import { create, eventually, remove, request, unique } from './_node.mjs'

test('a paused sandbox goes on where it was', async () => {
  const sbx = await create()
  await sbx.files.write('kept', 'on disk')
  const handle = await sbx.commands.run('sleep 3000', { background: true, timeoutMs: 0 })
  const token = (await sbx.commands.run('cat /proc/$PPID/cmdline | head -c 0; echo $RANDOM > /dev/shm/mem 2>/dev/null; cat /dev/shm/mem')).stdout
  assert.equal(await sbx.pause(), true)
  assert.equal(await sbx.pause(), false)
  assert.equal(await sbx.isRunning(), false)
  assert.equal((await sbx.getInfo()).state, 'paused')
  const again = await Sandbox.connect(sbx.sandboxId)
  assert.equal(await sbx.isRunning(), true)
  assert.equal(await again.files.read('kept'), 'on disk')
  assert.ok((await again.commands.list()).some((p) => p.pid === handle.pid), 'the process has another pid')
  assert.match((await again.commands.run(`ps -o args= -p ${handle.pid} || tr '\\0' ' ' < /proc/${handle.pid}/cmdline`)).stdout, /sleep 3000/)
  assert.equal((await again.commands.run('cat /dev/shm/mem')).stdout, token)
  const reconnected = await again.commands.connect(handle.pid)
  assert.equal(await reconnected.kill(), true)
})

test('a sandbox paused without its memory boots anew with its files', async () => {
  const sbx = await create()
  const boot = () => sbx.files.read('/proc/sys/kernel/random/boot_id')
  await sbx.files.write('kept', 'on disk')
  await sbx.commands.run('sudo rm /etc/issue /etc/debian_version && sudo mv /etc/motd /etc/moved && { sleep 3000 >/dev/null 2>&1 & }')
  const before = await boot()
  for (const round of [1, 2]) {
    assert.equal(await sbx.pause({ keepMemory: false }), true)
    assert.equal(await sbx.isRunning(), false)
    await sbx.connect()
    assert.notEqual(await boot(), before)
    assert.equal(await sbx.files.read('kept'), 'on disk')
    assert.equal((await sbx.commands.run('ls /etc/issue /etc/debian_version /etc/motd /etc/moved 2>/dev/null || true')).stdout, '/etc/moved\n', `round ${round}`)
    assert.equal((await sbx.commands.list()).length, 0)
  }
})

test('at its timeout a sandbox is paused without its memory when that was asked for', async () => {
  const sbx = await create({ lifecycle: { onTimeout: { action: 'pause', keepMemory: false } } })
  const before = await sbx.files.read('/proc/sys/kernel/random/boot_id')
  await sbx.setTimeout(1_000)
  await eventually(async () => (await sbx.getInfo()).state === 'paused')
  assert.deepEqual((await sbx.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: false })
  await sbx.connect()
  assert.notEqual(await sbx.files.read('/proc/sys/kernel/random/boot_id'), before)
})

test('a sandbox pauses at its timeout and waits to be connected', async () => {
  const sbx = await create({ timeoutMs: 2_000, lifecycle: { onTimeout: 'pause', autoResume: false } })
  await eventually(async () => (await sbx.getInfo()).state === 'paused')
  assert.deepEqual((await sbx.getInfo()).lifecycle, { onTimeout: 'pause', autoResume: false })
  assert.equal(await sbx.isRunning(), false)
  await sbx.connect()
  assert.equal(await sbx.isRunning(), true)
})

test('traffic wakes a sandbox that wants it', async () => {
  const sbx = await create({ lifecycle: { onTimeout: 'pause', autoResume: true } })
  await sbx.commands.run('python3 -m http.server 8000', { background: true, timeoutMs: 0 })
  await eventually(async () => (await request(sbx, 8000)).status === 200)
  await sbx.setTimeout(300_000)
  await sbx.pause()
  assert.equal((await request(sbx, 8000)).status, 200)
  assert.equal((await sbx.getInfo()).state, 'running')
})

test('a sandbox ends at its timeout', async () => {
  const sbx = await create({ timeoutMs: 1_000 })
  await eventually(async () => !(await sbx.isRunning()))
  await assert.rejects(sbx.getInfo(), SandboxNotFoundError)
})

test('a snapshot starts any number of sandboxes, each its own', async () => {
  const sbx = await create()
  await sbx.files.write('shared', 'from the parent')
  const server = await sbx.commands.run('sleep 4000', { background: true, timeoutMs: 0 })
  const snapshot = await sbx.createSnapshot()
  const found = (await sbx.listSnapshots().nextItems()).map((s) => s.snapshotId)
  assert.ok(found.includes(snapshot.snapshotId))
  const [a, b] = await Promise.all([create({ template: snapshot.snapshotId }), create({ template: snapshot.snapshotId })])
  await a.files.write('shared', 'changed')
  assert.equal(await a.files.read('shared'), 'changed')
  assert.equal(await b.files.read('shared'), 'from the parent')
  assert.equal(await sbx.files.read('shared'), 'from the parent')
  assert.ok((await b.commands.list()).some((p) => p.pid === server.pid))
  assert.notEqual((await a.commands.run('head -c 16 /dev/urandom | od -An -tx1')).stdout, (await b.commands.run('head -c 16 /dev/urandom | od -An -tx1')).stdout)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), false)
})

test('a snapshot with a name is found by it', async () => {
  const sbx = await create()
  const name = unique('snap')
  const first = await sbx.createSnapshot({ name })
  assert.ok(first.names[0].includes(name))
  await sbx.files.write('later', 'yes')
  assert.equal((await sbx.createSnapshot({ name })).snapshotId, first.snapshotId)
  assert.equal((await Sandbox.listSnapshots({ name }).nextItems()).length, 1)
  const child = await create({ template: name })
  assert.equal(await child.files.read('later'), 'yes')
  assert.equal(await Sandbox.deleteSnapshot(first.snapshotId), true)
})

test('a fork goes on by itself from where its parent is', async () => {
  const sbx = await create()
  await sbx.files.write('state', 'before')
  const children = await sbx.fork({ count: 3, timeoutMs: 120_000 })
  assert.equal(children.length, 3)
  for (const child of children) {
    assert.ok(child instanceof Sandbox, String(child))
    remove(child.sandboxId)
    assert.equal(await child.files.read('state'), 'before')
    await child.files.write('state', child.sandboxId)
  }
  assert.equal(new Set([sbx, ...children].map((s) => s.sandboxId)).size, 4)
  assert.equal(await sbx.files.read('state'), 'before')
  assert.ok(await sbx.isRunning())
  await sbx.kill()
  await assert.rejects(sbx.fork(), SandboxNotFoundError)
})
