import { test } from 'node:test'
import assert from 'node:assert/strict'
import { ALL_TRAFFIC, CommandExitError } from 'e2b'
import { create, eventually, request } from './_node.mjs'

const serve = (sbx, port) => sbx.commands.run(`python3 -m http.server ${port}`, { background: true, timeoutMs: 0 })

test('a server inside is reached by its port, and a closed port is told from it', async () => {
  const sbx = await create()
  await sbx.files.write('index.html', '<h1>inside</h1>')
  await serve(sbx, 8000)
  const open = await eventually(async () => {
    const r = await request(sbx, 8000)
    return r.status === 200 && r
  })
  assert.equal(open.text, '<h1>inside</h1>')
  const closed = await request(sbx, 3000)
  assert.equal(closed.status, 502)
  assert.deepEqual(JSON.parse(closed.text), { sandboxId: sbx.sandboxId, message: 'The sandbox is running but port is not open', port: 3000, code: 502 })
  const page = await request(sbx, 3000, { headers: { 'user-agent': 'Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36' } })
  assert.equal(page.status, 502)
  assert.match(page.text, /<title>Closed Port Error<\/title>/)
  await sbx.kill()
  const gone = await request(sbx, 8000)
  assert.equal(gone.status, 502)
  assert.deepEqual(JSON.parse(gone.text), { sandboxId: sbx.sandboxId, message: 'The sandbox was not found', code: 502 })
})

test('private traffic needs its token', async () => {
  const sbx = await create({ network: { allowPublicTraffic: false } })
  assert.ok(sbx.trafficAccessToken)
  await serve(sbx, 8080)
  await eventually(async () => (await request(sbx, 8080, { headers: { 'e2b-traffic-access-token': sbx.trafficAccessToken } })).status === 200)
  assert.equal((await request(sbx, 8080)).status, 403)
  assert.equal((await request(sbx, 8080, { headers: { 'e2b-traffic-access-token': 'guess' } })).status, 403)
  assert.equal((await sbx.commands.run('echo the agent is not affected')).exitCode, 0)
})

test('servers inside see the host name that was asked for', async () => {
  const sbx = await create({ network: { maskRequestHost: 'custom-host.example.com:${PORT}' } })
  await sbx.files.write('host.py', 'import http.server\nclass H(http.server.BaseHTTPRequestHandler):\n  def do_GET(s):\n    s.send_response(200); s.end_headers(); s.wfile.write(s.headers["Host"].encode())\nhttp.server.HTTPServer(("", 8080), H).serve_forever()\n')
  await sbx.commands.run('python3 host.py', { background: true, timeoutMs: 0 })
  const r = await eventually(async () => {
    const got = await request(sbx, 8080)
    return got.status === 200 && got
  })
  assert.equal(r.text, 'custom-host.example.com:8080')
})

// What the internet outside allows is not the test's business: it asks only
// whether the sandbox's own network lets a connection begin.
const reach = (sbx, where) => sbx.commands.run(`timeout 5 bash -c 'exec 3<>/dev/tcp/${where}'`)

test('a sandbox without internet reaches nothing', async () => {
  for (const opts of [{ allowInternetAccess: false }, { network: { denyOut: [ALL_TRAFFIC] } }]) {
    const sbx = await create(opts)
    await assert.rejects(reach(sbx, '1.1.1.1/443'), CommandExitError)
    await assert.rejects(reach(sbx, '169.254.169.254/80'), CommandExitError)
    await sbx.kill()
  }
})

test('network rules are shown and can be replaced', async () => {
  const rules = { denyOut: [ALL_TRAFFIC], allowOut: ['1.1.1.1', '*.example.com'] }
  const sbx = await create({ network: rules })
  const { network } = await sbx.getInfo()
  assert.deepEqual([network.denyOut, network.allowOut, network.allowPublicTraffic], [rules.denyOut, rules.allowOut, true])
  await sbx.updateNetwork({ denyOut: ['8.8.8.8'] })
  const now = (await sbx.getInfo()).network
  assert.deepEqual([now.denyOut, now.allowOut], [['8.8.8.8'], undefined])
  await assert.rejects(sbx.updateNetwork({ denyOut: ['example.com'] }), /400/)
})
