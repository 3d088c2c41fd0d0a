import { after, before, test } from 'node:test'
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Sandbox } from 'e2b'
import { create, remove, unique } from './_node.mjs'

const program = fileURLToPath(import.meta.resolve('@e2b/cli/dist/index.js'))
const home = mkdtempSync(join(tmpdir(), 'e2b-cli-'))
after(() => rmSync(home, { recursive: true }))

/** Runs E2B's command line and resolves to how it ended. */
function e2b(args, { input, cwd } = {}) {
  return new Promise((resolve) => {
    const child = execFile(process.execPath, [program, ...args], { cwd, env: { ...process.env, HOME: home, NO_COLOR: '1', E2B_DISABLE_UPDATE: '1' }, timeout: 120_000 }, (error, stdout, stderr) =>
      resolve({ code: error ? error.code : 0, stdout, stderr })
    )
    if (input !== undefined) child.stdin.end(input)
    else child.stdin.end()
  })
}

/** As e2b, but it has to end well. */
async function ok(...args) {
  const r = await e2b(args)
  assert.equal(r.code, 0, `e2b ${args.join(' ')}: ${r.stdout}${r.stderr}`)
  return r.stdout
}

let sbx
before(async () => {
  sbx = await create({ metadata: { from: 'cli-test' } })
})

test('sandboxes are created, listed, described and killed', async () => {
  const id = (await ok('sandbox', 'create', '--detach', 'base')).trim().split('\n').at(-1)
  remove(id)
  assert.match(id, /^[a-z0-9]+$/)
  const list = JSON.parse(await ok('sandbox', 'list', '--format', 'json'))
  assert.ok(list.some((s) => s.sandboxId === id))
  assert.match(await ok('sandbox', 'list', '--metadata', 'from=cli-test'), new RegExp(sbx.sandboxId))
  assert.equal(JSON.parse(await ok('sandbox', 'info', id, '--format', 'json')).sandboxId, id)
  assert.match(await ok('sandbox', 'kill', id), /has been killed/)
  assert.match((await e2b(['sandbox', 'kill', id])).stderr, /wasn't found/)
  assert.equal((await e2b(['sandbox', 'info', id])).code, 1)
})

test('commands run with their input, output and exit code', async () => {
  const r = await e2b(['sandbox', 'exec', '-u', 'root', '-c', '/tmp', '-e', 'A=1', sbx.sandboxId, 'echo $A $(whoami) $(pwd); echo err >&2; exit 5'])
  assert.deepEqual([r.code, r.stdout], [5, '1 root /tmp\n'])
  assert.match(r.stderr, /^err\n/)
  assert.equal((await e2b(['sandbox', 'exec', sbx.sandboxId, 'cat'], { input: 'piped in' })).stdout, 'piped in')
})

test('logs and metrics are shown', async () => {
  await sbx.commands.run('true')
  assert.match(await ok('sandbox', 'logs', sbx.sandboxId), /sandbox is running/)
  assert.match(await ok('sandbox', 'metrics', sbx.sandboxId), /CPU/)
})

test('a sandbox is paused and resumed', async () => {
  assert.match(await ok('sandbox', 'pause', sbx.sandboxId), /has been paused/)
  assert.match(await ok('sandbox', 'pause', sbx.sandboxId), /already paused/)
  assert.match(await ok('sandbox', 'resume', sbx.sandboxId), /has been resumed/)
  assert.equal(await sbx.isRunning(), true)
})

test('snapshots are created, listed and deleted', async () => {
  const name = unique('cli-snap')
  const id = (await ok('sandbox', 'snapshot', 'create', sbx.sandboxId, '--name', name)).match(/Created snapshot (\S+)/)[1]
  assert.match(await ok('sandbox', 'snapshot', 'list'), new RegExp(name))
  assert.match(await ok('sandbox', 'snapshot', 'delete', id), /has been deleted/)
})

test('a template is built from a Dockerfile, listed, published and deleted', async () => {
  const dir = mkdtempSync(join(home, 'template-'))
  const name = unique('cli-tpl')
  writeFileSync(join(dir, 'hello.txt'), 'from the command line\n')
  writeFileSync(join(dir, 'e2b.Dockerfile'), 'FROM e2bdev/base\nCOPY hello.txt /srv/hello.txt\nRUN echo built > /srv/built\n')
  const built = await e2b(['template', 'create', name, '--path', dir, '--cpu-count', '1', '--memory-mb', '512'])
  assert.equal(built.code, 0, built.stdout + built.stderr)
  const child = await create({ template: name })
  assert.equal((await child.commands.run('cat /srv/hello.txt /srv/built')).stdout, 'from the command line\nbuilt\n')
  const listed = JSON.parse((await ok('template', 'list', '--format', 'json')).slice(1)).find((t) => t.aliases.includes(name))
  assert.deepEqual([listed.buildStatus, listed.public], ['ready', false])
  assert.match(await ok('template', 'list'), new RegExp(name))
  assert.match(await ok('template', 'publish', '--yes', name), /Published as/)
  await ok('template', 'unpublish', '--yes', name)
  await ok('template', 'delete', '--yes', name)
  await assert.rejects(Sandbox.create(name), /404/)
})
