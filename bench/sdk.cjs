// For every line on standard input: makes a sandbox with E2B's SDK, runs a command
// in it, and prints how many milliseconds passed until its output was there. Removing
// the sandbox is not counted. The SDK is the one that test/e2b pins.
const { createRequire } = require('node:module')
const path = require('node:path')
const readline = require('node:readline')

const { Sandbox } = createRequire(path.join(__dirname, '..', 'test', 'e2b', 'package.json'))('e2b')
const [, , word, runtime] = process.argv
const metadata = runtime ? { 'atoll.runtime': runtime } : undefined

async function main() {
  for await (const _ of readline.createInterface({ input: process.stdin })) {
    const from = performance.now()
    const sandbox = await Sandbox.create('base', { timeoutMs: 60_000, metadata })
    const { stdout } = await sandbox.commands.run(`echo ${word}`)
    const took = performance.now() - from
    await sandbox.kill()
    if (stdout.trim() !== word) throw new Error(`printed ${stdout}`)
    console.log(took.toFixed(3))
  }
}

main().catch((err) => {
  console.error(err)
  process.exit(1)
})
