import { before, test } from 'node:test'
import assert from 'node:assert/strict'
import { create, eventually } from './_node.mjs'

let sbx
before(async () => {
  sbx = await create()
})

/** Opens a terminal and collects what it prints. */
async function open(opts = {}) {
  let text = ''
  const term = await sbx.pty.create({ cols: 80, rows: 24, timeoutMs: 0, onData: (d) => (text += new TextDecoder().decode(d)), ...opts })
  return { term, text: () => text, type: (line) => sbx.pty.sendInput(term.pid, new TextEncoder().encode(line)) }
}

test('a terminal runs what is typed and knows its size', async () => {
  const { term, text, type } = await open({ envs: { MARK: 'set' }, cwd: '/tmp' })
  await type('echo "<$MARK $(pwd) $(tput cols 2>/dev/null || stty size | cut -d\\  -f2)>"\n')
  await eventually(() => text().includes('<set /tmp 80>'))
  await sbx.pty.resize(term.pid, { cols: 120, rows: 30 })
  await type('stty size\n')
  await eventually(() => text().includes('30 120'))
  await type('exit 0\n')
  assert.equal((await term.wait()).exitCode, 0)
})

test('a terminal can be left, taken up again and killed', async () => {
  const { term, text } = await open()
  await eventually(() => text().length > 0)
  await term.disconnect()
  let more = ''
  const again = await sbx.pty.connect(term.pid, { onData: (d) => (more += new TextDecoder().decode(d)) })
  await sbx.pty.sendInput(term.pid, new TextEncoder().encode('echo $((40+2))\n'))
  await eventually(() => more.includes('42'))
  assert.equal(await sbx.pty.kill(term.pid), true)
  await assert.rejects(again.wait())
  assert.equal(await sbx.pty.kill(term.pid), false)
})
