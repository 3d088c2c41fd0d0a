import { before, test } from 'node:test'
import assert from 'node:assert/strict'
import { GitUpstreamError } from 'e2b'
import { create } from './_node.mjs'

let sbx
const repo = '/home/user/repo'
before(async () => {
  sbx = await create()
  await sbx.git.configureUser('Ada', 'ada@example.com')
  await sbx.git.init(repo, { initialBranch: 'main' })
})

test('changes are added, committed, restored and reset', async () => {
  await sbx.files.write(`${repo}/a.txt`, 'one\n')
  let status = await sbx.git.status(repo)
  assert.equal(status.currentBranch, 'main')
  assert.deepEqual(status.fileStatus.map((f) => [f.name, f.status]), [['a.txt', 'untracked']])
  await sbx.git.add(repo)
  await sbx.git.commit(repo, 'first')
  assert.equal((await sbx.git.status(repo)).fileStatus.length, 0)
  await sbx.files.write(`${repo}/a.txt`, 'two\n')
  await sbx.git.restore(repo, { paths: ['a.txt'] })
  assert.equal(await sbx.files.read(`${repo}/a.txt`), 'one\n')
  await sbx.files.write(`${repo}/b.txt`, 'b\n')
  await sbx.git.add(repo, { files: ['b.txt'] })
  await sbx.git.reset(repo)
  assert.deepEqual((await sbx.git.status(repo)).fileStatus.map((f) => f.status), ['untracked'])
})

test('branches are made, listed and deleted', async () => {
  await sbx.git.createBranch(repo, 'feature')
  let branches = await sbx.git.branches(repo)
  assert.deepEqual([branches.branches.sort(), branches.currentBranch], [['feature', 'main'], 'feature'])
  await sbx.git.checkoutBranch(repo, 'main')
  await sbx.git.deleteBranch(repo, 'feature')
  branches = await sbx.git.branches(repo)
  assert.deepEqual(branches.branches, ['main'])
})

test('a clone pulls what another pushed', async () => {
  await sbx.git.init('/home/user/origin.git', { bare: true, initialBranch: 'main' })
  await sbx.git.remoteAdd(repo, 'origin', '/home/user/origin.git')
  assert.equal(await sbx.git.remoteGet(repo, 'origin'), '/home/user/origin.git')
  await assert.rejects(sbx.git.pull(repo), GitUpstreamError)
  await sbx.git.push(repo, { remote: 'origin', branch: 'main' })
  await sbx.git.clone('/home/user/origin.git', { path: '/home/user/copy' })
  assert.equal(await sbx.files.read('/home/user/copy/a.txt'), 'one\n')
  await sbx.files.write(`${repo}/c.txt`, 'c\n')
  await sbx.git.add(repo)
  await sbx.git.commit(repo, 'second')
  await sbx.git.push(repo)
  await sbx.git.pull('/home/user/copy')
  assert.equal(await sbx.files.read('/home/user/copy/c.txt'), 'c\n')
})

test('configuration is kept', async () => {
  await sbx.git.setConfig('pull.rebase', 'false', { scope: 'local', path: repo })
  assert.equal(await sbx.git.getConfig('pull.rebase', { scope: 'local', path: repo }), 'false')
  assert.equal(await sbx.git.getConfig('user.name', { scope: 'global' }), 'Ada')
})
