import { test } from 'node:test'
import assert from 'node:assert/strict'
import { release } from 'node:os'
import { Sandbox } from 'e2b'
import { create, remove } from './_node.mjs'

test('a sandbox on a kernel of its own does what others do', async () => {
  const sbx = await create({ metadata: { 'atoll.runtime': 'microvm' }, envs: { GREETING: 'hello' } })
  const kernel = (await sbx.commands.run('uname -r')).stdout.trim()
  assert.notEqual(kernel, release(), 'it has the kernel of its host')
  assert.equal((await sbx.commands.run('echo $GREETING')).stdout, 'hello\n')
  await assert.rejects(sbx.commands.run('exit 3'), { exitCode: 3 })
  await sbx.files.write('/home/user/a/b.txt', 'content')
  assert.equal(await sbx.files.read('/home/user/a/b.txt'), 'content')
  assert.deepEqual((await sbx.files.list('/home/user/a')).map((f) => f.name), ['b.txt'])
  const waits = await sbx.commands.run('sleep 1000', { background: true })

  await sbx.pause()
  await sbx.connect()
  assert.ok((await sbx.commands.list()).some((p) => p.pid === waits.pid), 'its process is gone')
  assert.equal(await sbx.files.read('/home/user/a/b.txt'), 'content')

  const snapshot = await sbx.createSnapshot()
  const [child] = await sbx.fork({ count: 1, timeoutMs: 120_000 })
  remove(child.sandboxId)
  const copy = await create({ template: snapshot.snapshotId })
  const random = await Promise.all(
    [sbx, child, copy].map(async (s) => (await s.commands.run('head -c 16 /dev/urandom | od -An -tx1')).stdout)
  )
  assert.equal(new Set(random).size, 3, 'forks draw the same random numbers')
  await sbx.files.write('/home/user/a/b.txt', 'changed')
  for (const s of [child, copy]) assert.equal(await s.files.read('/home/user/a/b.txt'), 'content')
  assert.equal(await Sandbox.deleteSnapshot(snapshot.snapshotId), true)
})
