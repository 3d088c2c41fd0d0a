import { after, before, test } from 'node:test'
import assert from 'node:assert/strict'
import { Volume, VolumeNotFoundError, VolumePathNotFoundError } from 'e2b'
import { create, unique } from './_node.mjs'

let volume
before(async () => {
  volume = await Volume.create(unique('vol'))
})
after(() => Volume.destroy(volume.volumeId))

test('volumes are made, found and destroyed', async () => {
  const name = unique('vol')
  const vol = await Volume.create(name)
  assert.deepEqual([(await Volume.getInfo(vol.volumeId)).name, (await Volume.connect(vol.volumeId)).token], [name, vol.token])
  assert.ok((await Volume.list()).some((v) => v.volumeId === vol.volumeId))
  await assert.rejects(Volume.create(name))
  assert.equal(await Volume.destroy(vol.volumeId), true)
  assert.equal(await Volume.destroy(vol.volumeId), false)
  await assert.rejects(Volume.getInfo(vol.volumeId), VolumeNotFoundError)
})

test('files in volumes', async () => {
  await volume.writeFile('/a.txt', 'hello', { uid: 1000, gid: 1000, mode: 0o600 })
  assert.equal(await volume.readFile('/a.txt'), 'hello')
  await assert.rejects(volume.writeFile('/a.txt', 'again'))
  await volume.writeFile('/a.txt', new Blob(['again']), { force: true })
  assert.deepEqual(await volume.readFile('/a.txt', { format: 'bytes' }), new TextEncoder().encode('again'))
  await volume.writeFile('/empty', '')
  assert.equal(await volume.readFile('/empty'), '')
  await volume.makeDir('/x/y/z', { force: true })
  assert.equal((await volume.getInfo('/x/y/z')).type, 'directory')
  assert.deepEqual((await volume.list('/')).map((e) => e.name).sort(), ['a.txt', 'empty', 'x'])
  const updated = await volume.updateMetadata('/a.txt', { uid: 1001, gid: 1001, mode: 0o755 })
  assert.deepEqual([updated.uid, updated.gid, updated.mode], [1001, 1001, 0o755])
  assert.equal(await volume.exists('/ghost'), false)
  const calls = [() => volume.readFile('/ghost'), () => volume.list('/ghost'), () => volume.remove('/ghost'), () => volume.updateMetadata('/ghost', { mode: 0o644 })]
  for (const call of calls) await assert.rejects(call, VolumePathNotFoundError)
  await volume.remove('/x')
  assert.equal(await volume.exists('/x'), false)
})

test('what one sandbox writes to a volume the next one reads', async () => {
  const writer = await create({ volumeMounts: { '/mnt/data': volume } })
  await writer.files.write('/mnt/data/hello.txt', 'written by the writer')
  assert.deepEqual((await writer.getInfo()).volumeMounts, [{ name: volume.name, path: '/mnt/data' }])
  await writer.kill()
  assert.equal(await volume.readFile('/hello.txt'), 'written by the writer')
  const reader = await create({ volumeMounts: { '/mnt/data': volume } })
  assert.equal(await reader.files.read('/mnt/data/hello.txt'), 'written by the writer')
})
