// What the tests of this folder share: sandboxes that are removed after their
// test, and plain HTTP to ports inside them.
import { after } from 'node:test'
import http from 'node:http'
import https from 'node:https'
import { Sandbox } from 'e2b'

export const template = process.env.E2B_TEST_TEMPLATE || 'base'

/** Makes a sandbox that lives until the end of the test file at most. */
export async function create(opts = {}) {
  const { template: from = template, ...rest } = opts
  const sbx = await Sandbox.create(from, { timeoutMs: 300_000, ...rest })
  remove(sbx.sandboxId)
  return sbx
}

const made = new Set()

/** Sees to it that a sandbox is killed when the file's tests are over. */
export function remove(id) {
  made.add(id)
}

after(async () => {
  await Promise.all([...made].map((id) => Sandbox.kill(id).catch(() => false)))
})

/**
 * Sends a request to a port of a sandbox as a browser would: by host name. The
 * name need not resolve, since the node's own address is used.
 */
export function request(sbx, port, { path = '/', method = 'GET', headers = {}, body } = {}) {
  const base = new URL(process.env.E2B_SANDBOX_URL)
  const client = base.protocol === 'https:' ? https : http
  return new Promise((resolve, reject) => {
    const req = client.request(
      { hostname: base.hostname, port: base.port, path, method, headers: { host: sbx.getHost(port), ...headers }, agent: false },
      (res) => {
        const chunks = []
        res.on('data', (c) => chunks.push(c))
        res.on('end', () => resolve({ status: res.statusCode, headers: res.headers, text: Buffer.concat(chunks).toString() }))
        res.on('error', reject)
      }
    )
    req.on('error', reject)
    req.end(body)
  })
}

/** Tries until fn gives something true, for about as many seconds. */
export async function eventually(fn, seconds = 20) {
  for (let left = seconds * 10; ; left--) {
    const value = await fn()
    if (value) return value
    if (left === 0) throw new Error('it did not happen in time')
    await new Promise((r) => setTimeout(r, 100))
  }
}

/** A name that no other test uses. */
export const unique = (prefix) => `${prefix}-${Math.random().toString(36).slice(2, 10)}`
