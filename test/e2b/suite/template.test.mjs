import { after, test } from 'node:test'
import assert from 'node:assert/strict'
import { BuildError, Template, waitForPort, waitForTimeout } from 'e2b'
import { create, eventually, request, unique } from './_node.mjs'

const names = []
const build = (template, name, opts) => {
  names.push(name.split(':')[0])
  return Template.build(template, name, { cpuCount: 1, memoryMB: 512, ...opts })
}
const remove = (id) => fetch(`${process.env.E2B_API_URL}/templates/${encodeURIComponent(id)}`, { method: 'DELETE', headers: { 'x-api-key': process.env.E2B_API_KEY } })

after(async () => {
  for (const name of new Set(names)) await remove(name)
})

test('a template is built from instructions and files', async () => {
  const name = unique('built')
  const logs = []
  const definition = Template({ fileContextPath: 'suite/files' })
    .fromTemplate('base')
    .copy('a.txt', 'a.txt')
    .copy('nested', '/srv/nested/', { mode: 0o755 })
    .setEnvs({ FLAVOUR: 'sea salt', OTHER: '2' })
    .runCmd('cat a.txt && echo "$FLAVOUR" > flavour && whoami > who')
    .runCmd('touch /etc/by-root', { user: 'root' })
    .setWorkdir('/srv')
    .runCmd('pwd > /home/user/where')
  const info = await build(definition, name, { skipCache: true, onBuildLogs: (l) => logs.push(l.message) })
  assert.ok(info.templateId && info.buildId)
  assert.ok(logs.some((l) => l.includes('copied')), logs.join('\n'))
  assert.equal(await Template.exists(name), true)
  const sbx = await create({ template: name })
  assert.equal(await sbx.files.read('/home/user/a.txt'), 'copied\n')
  assert.equal(await sbx.files.read('/srv/nested/b.txt'), 'nested\n')
  assert.equal(await sbx.files.read('/home/user/flavour'), 'sea salt\n')
  assert.equal(await sbx.files.read('/home/user/who'), 'user\n')
  assert.equal(await sbx.files.read('/home/user/where'), '/srv\n')
  assert.equal((await sbx.files.getInfo('/home/user/a.txt')).owner, 'user')
  assert.equal((await sbx.commands.run('echo $FLAVOUR; pwd; ls /etc/by-root')).stdout, 'sea salt\n/srv\n/etc/by-root\n')
  assert.equal((await sbx.getInfo()).memoryMB, 512)
  // The same files are not uploaded again.
  const again = []
  await build(definition, name, { onBuildLogs: (l) => again.push(l.message) })
  assert.ok(again.some((l) => l.includes('already cached')), again.join('\n'))
})

test('a start command already runs in new sandboxes', async () => {
  const name = unique('served')
  await build(Template().fromBaseImage().setStartCmd('python3 -m http.server 8123', waitForPort(8123)), name)
  const sbx = await create({ template: name })
  assert.equal((await request(sbx, 8123)).status, 200)
})

test('a build that fails says at which step and why', async () => {
  const definition = Template().fromTemplate('base').runCmd('true').runCmd('echo about to fail; exit 7')
  await assert.rejects(build(definition, unique('fails')), (e) => e instanceof BuildError && /7/.test(e.message))
  await assert.rejects(build(Template().fromTemplate('no-such-template'), unique('fails')), /404/)
})

test('a build goes on in the background', async () => {
  const name = unique('slow')
  names.push(name)
  const info = await Template.buildInBackground(Template().fromTemplate('base').skipCache().runCmd('sleep 2').setStartCmd('sleep 1000', waitForTimeout(500)), name)
  assert.ok(['building', 'waiting'].includes((await Template.getBuildStatus(info)).status))
  await eventually(async () => (await Template.getBuildStatus(info)).status === 'ready', 60)
})

test('tags name builds', async () => {
  const name = unique('tagged')
  const first = await build(Template().fromTemplate('base').runCmd('echo 1 > version'), `${name}:v1`)
  assert.deepEqual(await Template.assignTags(`${name}:v1`, ['stable', 'production']), { buildId: first.buildId, tags: ['stable', 'production'] })
  await build(Template().fromTemplate('base').runCmd('echo 2 > version'), name, { tags: ['v2'] })
  const read = async (ref) => (await (await create({ template: ref })).files.read('version')).trim()
  assert.deepEqual(await Promise.all([read(`${name}:v1`), read(`${name}:stable`), read(`${name}:v2`)]), ['1', '1', '2'])
  const tags = await Template.getTags(first.templateId)
  assert.deepEqual(tags.map((t) => t.tag).sort(), ['production', 'stable', 'v1', 'v2'])
  await Template.removeTags(name, 'stable')
  await assert.rejects(create({ template: `${name}:stable` }), /404/)
  await assert.rejects(Template.assignTags(`${name}:v1`, ':bad'))
  await assert.rejects(Template.removeTags('no-such-template', 'x'))
})

test('names that exist are told from those that do not', async () => {
  assert.equal(await Template.exists('base'), true)
  assert.equal(await Template.exists(unique('ghost')), false)
})
