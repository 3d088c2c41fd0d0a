import { before, test } from 'node:test'
import assert from 'node:assert/strict'
import { CommandExitError, InvalidArgumentError, TimeoutError } from 'e2b'
import { create, eventually } from './_node.mjs'

let sbx
before(async () => {
  sbx = await create({ envs: { FROM_CREATE: 'yes' } })
})

test('a command gives its output and exit code', async () => {
  const ok = await sbx.commands.run('echo out; echo err >&2')
  assert.deepEqual([ok.exitCode, ok.stdout, ok.stderr], [0, 'out\n', 'err\n'])
  await assert.rejects(sbx.commands.run('exit 3'), (e) => e instanceof CommandExitError && e.exitCode === 3)
  await assert.rejects(sbx.commands.run('no-such-command'), (e) => e instanceof CommandExitError && e.exitCode === 127)
})

test('output with any characters and of any length arrives whole', async () => {
  const text = 'sp ec"ial \'ch\\ars\' $HOME `é` 😀'
  await sbx.files.write('text', text)
  assert.equal((await sbx.commands.run('cat text')).stdout, text)
  const { stdout } = await sbx.commands.run('head -c 3000000 /dev/zero | tr "\\0" x')
  assert.equal(stdout.length, 3_000_000)
})

test('output streams while the command runs', async () => {
  const seen = []
  const handle = await sbx.commands.run('for i in 1 2 3; do echo $i; sleep 0.2; done', { background: true, onStdout: (d) => seen.push(d) })
  const result = await handle.wait()
  assert.equal(seen.join(''), '1\n2\n3\n')
  assert.ok(seen.length > 1, 'all came at once')
  assert.equal(result.stdout, '1\n2\n3\n')
})

test('user, directory and environment are as asked for', async () => {
  assert.equal((await sbx.commands.run('whoami; pwd')).stdout, 'user\n/home/user\n')
  assert.equal((await sbx.commands.run('whoami', { user: 'root' })).stdout, 'root\n')
  assert.equal((await sbx.commands.run('pwd', { cwd: '/tmp' })).stdout, '/tmp\n')
  assert.equal((await sbx.commands.run('echo $FROM_CREATE $ONLY_HERE', { envs: { ONLY_HERE: 'too' } })).stdout, 'yes too\n')
  assert.equal((await sbx.commands.run('sudo whoami')).stdout, 'root\n')
  await assert.rejects(sbx.commands.run('true', { cwd: '/no/such/dir' }))
  await assert.rejects(sbx.commands.run('true', { user: 'nobody-here' }))
})

test('a program can tell which sandbox it is in', async () => {
  const { stdout } = await sbx.commands.run('echo $E2B_SANDBOX $E2B_SANDBOX_ID; cat /run/e2b/.E2B_SANDBOX; echo; cat /run/e2b/.E2B_SANDBOX_ID')
  assert.equal(stdout, `true ${sbx.sandboxId}\ntrue\n${sbx.sandboxId}`)
})

test('stdin can be written and closed', async () => {
  const cat = await sbx.commands.run('cat', { background: true, stdin: true })
  await sbx.commands.sendStdin(cat.pid, 'hello ')
  await cat.sendStdin(new TextEncoder().encode('world'))
  await cat.closeStdin()
  assert.equal((await cat.wait()).stdout, 'hello world')
  // Without stdin a command reads an end of file at once.
  assert.equal((await sbx.commands.run('cat; echo done')).stdout, 'done\n')
})

test('a process is listed, reconnected to and killed', async () => {
  const handle = await sbx.commands.run('echo started; sleep 300', { background: true, timeoutMs: 0 })
  const listed = (await sbx.commands.list()).find((p) => p.pid === handle.pid)
  assert.deepEqual([listed.cmd, listed.args], ['/bin/bash', ['-l', '-c', 'echo started; sleep 300']])
  await handle.disconnect()
  const again = await sbx.commands.connect(handle.pid)
  assert.equal(await sbx.commands.kill(handle.pid), true)
  await assert.rejects(again.wait(), CommandExitError)
  await eventually(async () => !(await sbx.commands.list()).some((p) => p.pid === handle.pid))
  assert.equal(await sbx.commands.kill(handle.pid), false)
})

test('a command that takes too long is given up', async () => {
  await assert.rejects(sbx.commands.run('sleep 60', { timeoutMs: 500 }), TimeoutError)
})

test('many commands at once', async () => {
  const results = await Promise.all(Array.from({ length: 25 }, (_, i) => sbx.commands.run(`echo ${i}`)))
  assert.deepEqual(results.map((r) => r.stdout.trim()), results.map((_, i) => String(i)))
})

test('a command breaks off when its sandbox is killed', async () => {
  const victim = await create()
  const handle = await victim.commands.run('sleep 300', { background: true, timeoutMs: 0 })
  const end = assert.rejects(handle.wait(), TimeoutError)
  await victim.kill()
  await end
  await assert.rejects(victim.commands.run('true'), (e) => !(e instanceof InvalidArgumentError))
})
