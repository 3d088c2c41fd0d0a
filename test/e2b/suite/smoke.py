"""E2B's SDK for Python against a node: the common path of each part of it."""

import asyncio
import time
import unittest
import urllib.request
import uuid

from e2b import (
    AsyncSandbox,
    CommandExitException,
    FileNotFoundException,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxQuery,
    SandboxState,
    Template,
    TimeoutException,
    Volume,
)

TEMPLATE = "base"


class Sync(unittest.TestCase):
    def setUp(self):
        self.sandbox = Sandbox.create(TEMPLATE, timeout=300, metadata={"mark": uuid.uuid4().hex, "a=b": "c d&é"}, envs={"GREETING": "hello"})
        self.addCleanup(self.sandbox.kill)

    def test_sandboxes_are_listed_and_described(self):
        info = self.sandbox.get_info()
        self.assertEqual(info.state, SandboxState.RUNNING)
        found = Sandbox.list(query=SandboxQuery(metadata=info.metadata)).next_items()
        self.assertEqual([s.sandbox_id for s in found], [self.sandbox.sandbox_id])
        self.assertTrue(self.sandbox.is_running())
        self.assertGreater(len(self.sandbox.get_metrics()), 0)
        self.sandbox.set_timeout(60)
        self.assertLess(self.sandbox.get_info().end_at, info.end_at)

    def test_commands(self):
        out = self.sandbox.commands.run("echo $GREETING; echo err >&2")
        self.assertEqual((out.exit_code, out.stdout, out.stderr), (0, "hello\n", "err\n"))
        with self.assertRaises(CommandExitException) as caught:
            self.sandbox.commands.run("exit 4")
        self.assertEqual(caught.exception.exit_code, 4)
        with self.assertRaises(TimeoutException):
            self.sandbox.commands.run("sleep 30", timeout=0.5)
        seen = []
        handle = self.sandbox.commands.run("cat", background=True, stdin=True)
        self.sandbox.commands.send_stdin(handle.pid, "in")
        handle.close_stdin()
        self.assertEqual(handle.wait(on_stdout=seen.append).stdout, "in")
        self.assertEqual(seen, ["in"])

    def test_files(self):
        self.sandbox.files.write("dir/text", "hello ✓")
        self.assertEqual(self.sandbox.files.read("dir/text"), "hello ✓")
        data = bytes(range(256)) * 100
        self.sandbox.files.write("bytes", data)
        self.assertEqual(bytes(self.sandbox.files.read("bytes", format="bytes")), data)
        self.assertEqual([e.name for e in self.sandbox.files.list("dir")], ["text"])
        self.sandbox.files.rename("dir/text", "dir/other")
        self.assertTrue(self.sandbox.files.exists("dir/other"))
        self.sandbox.files.remove("dir")
        with self.assertRaises((FileNotFoundException, NotFoundException)):
            self.sandbox.files.read("dir/other")
        with urllib.request.urlopen(self.sandbox.download_url("bytes", use_signature_expiration=60)) as res:
            self.assertEqual(res.read(), data)

    def test_changes_are_watched(self):
        self.sandbox.files.make_dir("watched")
        watch = self.sandbox.files.watch_dir("watched")
        self.sandbox.files.write("watched/new", "x")
        for _ in range(100):
            if any(e.name == "new" for e in watch.get_new_events()):
                break
            time.sleep(0.1)
        else:
            self.fail("no event came")
        watch.stop()

    def test_pause_and_connect(self):
        handle = self.sandbox.commands.run("sleep 1000", background=True, timeout=0)
        self.sandbox.pause()
        self.assertFalse(self.sandbox.is_running())
        again = Sandbox.connect(self.sandbox.sandbox_id)
        self.assertIn(handle.pid, [p.pid for p in again.commands.list()])

    def test_snapshots_and_forks(self):
        self.sandbox.files.write("state", "parent")
        snapshot = self.sandbox.create_snapshot()
        child = Sandbox.create(snapshot.snapshot_id)
        self.addCleanup(child.kill)
        self.assertEqual(child.files.read("state"), "parent")
        self.assertTrue(Sandbox.delete_snapshot(snapshot.snapshot_id))
        for fork in self.sandbox.fork(count=2):
            self.addCleanup(fork.kill)
            self.assertEqual(fork.files.read("state"), "parent")

    def test_git(self):
        self.sandbox.git.configure_user("Ada", "ada@example.com")
        self.sandbox.git.init("repo", initial_branch="main")
        self.sandbox.files.write("repo/a", "x")
        self.sandbox.git.add("repo")
        self.sandbox.git.commit("repo", "first")
        self.assertEqual(self.sandbox.git.status("repo").current_branch, "main")

    def test_errors(self):
        with self.assertRaises(NotFoundException):
            Sandbox.connect("ghost")
        self.assertFalse(Sandbox.kill("ghost"))


class Others(unittest.TestCase):
    def test_a_template_is_built(self):
        name = "py-" + uuid.uuid4().hex[:8]
        info = Template.build(Template().from_template("base").run_cmd("echo built > made"), name, cpu_count=1, memory_mb=512)
        self.assertTrue(Template.exists(name))
        Template.assign_tags(name, ["stable"])
        self.assertIn("stable", [t.tag for t in Template.get_tags(info.template_id)])
        sandbox = Sandbox.create(name + ":stable")
        self.addCleanup(sandbox.kill)
        self.assertEqual(sandbox.files.read("made"), "built\n")

    def test_volumes(self):
        volume = Volume.create("py-" + uuid.uuid4().hex[:8])
        self.addCleanup(Volume.destroy, volume.volume_id)
        volume.write_file("/a.txt", "hello")
        self.assertEqual(volume.read_file("/a.txt"), "hello")
        self.assertEqual([e.name for e in volume.list("/")], ["a.txt"])

    def test_the_asynchronous_interface(self):
        async def main():
            sandbox = await AsyncSandbox.create(TEMPLATE, timeout=120)
            try:
                results = await asyncio.gather(*(sandbox.commands.run(f"echo {i}") for i in range(8)))
                self.assertEqual([r.stdout.strip() for r in results], [str(i) for i in range(8)])
                await sandbox.files.write("a", "x")
                self.assertEqual(await sandbox.files.read("a"), "x")
                out = []
                term = await sandbox.pty.create(size=PtySize(rows=24, cols=80), on_data=lambda d: out.append(d), timeout=0)
                await sandbox.pty.send_stdin(term.pid, b"exit 0\n")
                self.assertEqual((await term.wait()).exit_code, 0)
            finally:
                await sandbox.kill()

        asyncio.run(main())


if __name__ == "__main__":
    unittest.main(verbosity=2)
