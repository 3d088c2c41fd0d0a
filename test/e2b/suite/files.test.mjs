import { before, test } from 'node:test'
import assert from 'node:assert/strict'
import { FileType, FilesystemEventType, InvalidArgumentError, NotFoundError } from 'e2b'
import { create, eventually, unique } from './_node.mjs'

let sbx
before(async () => {
  sbx = await create()
})

test('files are written and read in every form', async () => {
  const path = `${unique('dir')}/deep/file.txt`
  const info = await sbx.files.write(path, 'text ✓')
  assert.deepEqual([info.name, info.type, info.path], ['file.txt', 'file', `/home/user/${path}`])
  assert.equal(await sbx.files.read(path), 'text ✓')
  const bytes = new Uint8Array(70_000).map((_, i) => i % 251)
  await sbx.files.write('bytes', bytes.buffer)
  assert.deepEqual(await sbx.files.read('bytes', { format: 'bytes' }), bytes)
  await sbx.files.write('blob', new Blob(['blob']))
  assert.equal(await (await sbx.files.read('blob', { format: 'blob' })).text(), 'blob')
  await sbx.files.write('stream', new Response('stream').body)
  assert.equal(await new Response(await sbx.files.read('stream', { format: 'stream' })).text(), 'stream')
  await sbx.files.write('empty', '')
  assert.equal(await sbx.files.read('empty'), '')
})

test('files can be compressed on their way', async () => {
  const text = 'again and again\n'.repeat(20_000)
  await sbx.files.write('gz', text, { gzip: true })
  assert.equal(await sbx.files.read('gz', { gzip: true }), text)
  assert.equal((await sbx.commands.run('wc -c < gz')).stdout.trim(), String(text.length))
})

test('several files are written at once', async () => {
  const dir = unique('many')
  const written = await sbx.files.write(Array.from({ length: 12 }, (_, i) => ({ path: `${dir}/${i}`, data: `${i}` })))
  assert.equal(written.length, 12)
  for (let i = 0; i < 12; i++) assert.equal(await sbx.files.read(`${dir}/${i}`), `${i}`)
})

test('files belong to the user who writes them', async () => {
  await sbx.files.write('mine', 'x')
  await sbx.files.write('/tmp/roots', 'x', { user: 'root' })
  assert.equal((await sbx.files.getInfo('mine')).owner, 'user')
  assert.equal((await sbx.files.getInfo('/tmp/roots')).owner, 'root')
  assert.equal((await sbx.files.write('in-roots-home', 'x', { user: 'root' })).path, '/root/in-roots-home')
})

test('entries are described', async () => {
  await sbx.files.write('described', 'hello')
  await sbx.commands.run('chmod 640 described; ln -sf described link')
  const info = await sbx.files.getInfo('described')
  assert.deepEqual([info.type, info.size, info.mode & 0o777, info.group], [FileType.FILE, 5, 0o640, 'user'])
  assert.ok(info.modifiedTime instanceof Date)
  assert.equal((await sbx.files.getInfo('link')).symlinkTarget, '/home/user/described')
  assert.equal((await sbx.files.getInfo('/home/user')).type, FileType.DIR)
  await assert.rejects(sbx.files.getInfo('nothing-here'), NotFoundError)
})

test('metadata stays with a file', async () => {
  await sbx.files.write('tagged', 'x', { metadata: { author: 'me', stage: 'draft' } })
  assert.deepEqual((await sbx.files.getInfo('tagged')).metadata, { author: 'me', stage: 'draft' })
})

test('directories are made, listed, renamed and removed', async () => {
  const dir = unique('tree')
  assert.equal(await sbx.files.makeDir(`${dir}/a/b`), true)
  assert.equal(await sbx.files.makeDir(`${dir}/a/b`), false)
  await sbx.files.write(`${dir}/f`, 'x')
  assert.deepEqual((await sbx.files.list(dir)).map((e) => [e.name, e.type]).sort(), [['a', 'dir'], ['f', 'file']])
  assert.equal((await sbx.files.list(dir, { depth: 2 })).length, 3)
  await assert.rejects(sbx.files.list(dir, { depth: 0 }), InvalidArgumentError)
  await assert.rejects(sbx.files.list(`${dir}/ghost`), NotFoundError)
  assert.equal((await sbx.files.rename(`${dir}/f`, `${dir}/g`)).name, 'g')
  assert.equal(await sbx.files.exists(`${dir}/f`), false)
  assert.equal(await sbx.files.exists(`${dir}/g`), true)
  await assert.rejects(sbx.files.rename(`${dir}/ghost`, `${dir}/x`), NotFoundError)
  await sbx.files.remove(dir)
  assert.equal(await sbx.files.exists(dir), false)
})

test('reading what is not there or no file says so', async () => {
  await assert.rejects(sbx.files.read('not-there'), NotFoundError)
  await assert.rejects(sbx.files.read('/home/user'))
})

test('changes are watched', async () => {
  const dir = unique('watched')
  await sbx.files.makeDir(`${dir}/sub`)
  const events = []
  const handle = await sbx.files.watchDir(dir, (e) => events.push(e), { recursive: true })
  await sbx.files.write(`${dir}/new.txt`, 'x')
  await sbx.files.write(`${dir}/sub/deep.txt`, 'x')
  await sbx.files.remove(`${dir}/new.txt`)
  const has = (type, name) => events.some((e) => e.type === type && e.name === name)
  await eventually(() => has(FilesystemEventType.CREATE, 'new.txt') && has(FilesystemEventType.CREATE, 'sub/deep.txt') && has(FilesystemEventType.REMOVE, 'new.txt'))
  await handle.stop()
  await assert.rejects(sbx.files.watchDir('ghost', () => {}), NotFoundError)
})

test('signed links read and write without a token', async () => {
  await sbx.files.write('signed.txt', 'signed')
  const down = await fetch(await sbx.downloadUrl('signed.txt', { useSignatureExpiration: 60 }))
  assert.deepEqual([down.status, await down.text()], [200, 'signed'])
  const form = new FormData()
  form.append('file', 'uploaded')
  const up = await fetch(await sbx.uploadUrl('up.txt', { useSignatureExpiration: 60 }), { method: 'POST', body: form })
  assert.equal(up.status, 200)
  assert.deepEqual(await up.json(), [{ name: 'up.txt', path: '/home/user/up.txt', type: 'file' }])
  assert.equal(await sbx.files.read('up.txt'), 'uploaded')
  const expired = await fetch(await sbx.downloadUrl('signed.txt', { useSignatureExpiration: -60 }))
  assert.equal(expired.status, 401)
  assert.deepEqual(await expired.json(), { code: 401, message: 'signature is already expired' })
  const asRoot = await fetch(await sbx.uploadUrl('r.txt', { user: 'root', useSignatureExpiration: 60 }), { method: 'POST', body: form })
  assert.deepEqual(await asRoot.json(), [{ name: 'r.txt', path: '/root/r.txt', type: 'file' }])
})
