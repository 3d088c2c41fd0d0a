package runtimetest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/atoll-run/atoll/sandbox"
)

var snapshotTests = []test{
	{"a sandbox goes on after its snapshot", canSnapshot, testSnapshotGoesOn},
	{"one snapshot gives many sandboxes at once", canSnapshot, testRestoreMany},
	{"processes, memory and open files come back", canMemory, testRestoreMemory},
	{"stop ends the sandbox and the same ID comes back", canSnapshot, testSnapshotStop},
	{"a paused sandbox is snapshotted and stays paused", func(c sandbox.Capabilities) bool { return c.Snapshot && c.Pause }, testSnapshotPaused},
	{"a restored sandbox can be snapshotted again", canSnapshot, testSnapshotChain},
	{"another runtime restores it", canSnapshot, testRestoreElsewhere},
	{"names of any bytes, links and modes survive", canSnapshot, testSnapshotNames},
	{"what is no snapshot is refused and leaves nothing", canSnapshot, testRestoreGarbage},
	{"restore refuses a taken ID", canSnapshot, testRestoreTaken},
	{"a directory with something in it is refused", canSnapshot, testSnapshotNotEmpty},
	{"a canceled snapshot leaves the sandbox running", canSnapshot, testSnapshotCanceled},
}

// snapshot takes one into a fresh directory.
func (b *box) snapshot(opts sandbox.SnapshotOptions) (dir string) {
	b.t.Helper()
	dir = b.t.TempDir()
	if err := b.rt.Snapshot(deadline(b.t), b.id, dir, opts); err != nil {
		b.t.Fatalf("Snapshot: %v", err)
	}
	return dir
}

// restore makes a sandbox from a snapshot of b, as the spec of b but for the ID.
func (s *suite) restore(t *testing.T, b *box, dir string) *box {
	t.Helper()
	spec := b.spec
	spec.ID = sandbox.NewID()
	if err := s.Runtime.Restore(deadline(t), spec, dir); err != nil {
		t.Fatalf("Restore: %v", err)
	}
	return s.box(t, spec)
}

func testSnapshotGoesOn(t *testing.T, s *suite) {
	b := s.create(t)
	c := b.startCounter()
	pid := c.ask(1)
	b.snapshot(sandbox.SnapshotOptions{})
	s.wantState(t, b.id, sandbox.Running)
	if again := c.ask(2); again != pid {
		t.Errorf("process %s became %s over a snapshot", pid, again)
	}
}

func testRestoreMany(t *testing.T, s *suite) {
	const forks = 8
	b := s.create(t)
	b.must("mkdir deep; echo old > deep/file; echo gone > gone; rm gone")
	dir := b.snapshot(sandbox.SnapshotOptions{})
	before := digest(t, dir)
	b.must("echo changed since > deep/file")

	boxes := make([]*box, forks)
	errs := make([]error, forks)
	var wg sync.WaitGroup
	for i := range forks {
		spec := b.spec
		spec.ID = sandbox.NewID()
		boxes[i] = s.box(t, spec)
		wg.Go(func() { errs[i] = s.Runtime.Restore(deadline(t), spec, dir) })
	}
	wg.Wait()
	for i, fork := range boxes {
		if errs[i] != nil {
			t.Fatalf("Restore %d: %v", i, errs[i])
		}
		if got := fork.must("cat deep/file; ls gone 2>/dev/null; true"); got != "old\n" {
			t.Errorf("fork %d has %q, want what was there at the snapshot", i, got)
		}
		fork.must(fmt.Sprintf("echo fork %d > deep/file", i))
	}
	for i, fork := range boxes {
		if got, want := fork.must("cat deep/file"), fmt.Sprintf("fork %d\n", i); got != want {
			t.Errorf("fork %d reads %q, want its own %q", i, got, want)
		}
	}
	if got := b.must("cat deep/file"); got != "changed since\n" {
		t.Errorf("the forks changed their parent: %q", got)
	}
	if after := digest(t, dir); !maps.Equal(before, after) {
		t.Errorf("restoring changed the snapshot:\nbefore %v\nafter  %v", before, after)
	}
}

func testRestoreMemory(t *testing.T, s *suite) {
	b := s.create(t)
	c := b.startCounter()
	pid := c.ask(1)
	c.ask(2)
	dir := b.snapshot(sandbox.SnapshotOptions{})
	c.ask(3) // what happens later in the parent is not in the snapshot

	for i := range 2 {
		fork := s.restore(t, b, dir)
		fc := counter{fork}
		if again := fc.ask(3); again != pid {
			t.Errorf("fork %d: process %s became %s", i, pid, again)
		}
		fc.ask(4)
	}
	c.ask(4)
}

func testSnapshotStop(t *testing.T, s *suite) {
	b := s.create(t)
	b.write("mark", []byte("kept"))
	dir := b.snapshot(sandbox.SnapshotOptions{Stop: true})
	s.wantGone(t, b.id)
	if err := s.Runtime.Restore(deadline(t), b.spec, dir); err != nil {
		t.Fatalf("Restore with the same ID: %v", err)
	}
	s.wantState(t, b.id, sandbox.Running)
	if got := string(b.read("mark")); got != "kept" {
		t.Errorf("mark is %q after stop and restore", got)
	}
}

func testSnapshotPaused(t *testing.T, s *suite) {
	b := s.create(t)
	b.write("mark", []byte("kept"))
	if err := s.Runtime.Pause(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	dir := b.snapshot(sandbox.SnapshotOptions{})
	s.wantState(t, b.id, sandbox.Paused)
	fork := s.restore(t, b, dir)
	s.wantState(t, fork.id, sandbox.Running)
	if got := string(fork.read("mark")); got != "kept" {
		t.Errorf("mark is %q in the fork of a paused sandbox", got)
	}
	if err := s.Runtime.Resume(deadline(t), b.id); err != nil {
		t.Fatal(err)
	}
	b.must("true")
}

func testSnapshotChain(t *testing.T, s *suite) {
	b := s.create(t)
	for i := range 3 {
		b.must(fmt.Sprintf("echo %d >> chain", i))
		b = s.restore(t, b, b.snapshot(sandbox.SnapshotOptions{Stop: true}))
	}
	if got := b.must("cat chain"); got != "0\n1\n2\n" {
		t.Errorf("after three generations chain is %q", got)
	}
}

func testRestoreElsewhere(t *testing.T, s *suite) {
	other := &suite{Subject: s.open(t), open: s.open}
	t.Cleanup(func() {
		other.destroyAll(t)
		_ = other.Runtime.Close()
	})
	b := s.create(t, func(spec *sandbox.Spec) { spec.Root = other.Spec.Root })
	b.write("mark", []byte("moved"))
	dir := b.snapshot(sandbox.SnapshotOptions{Stop: true})
	moved := other.restore(t, b, dir)
	if got := string(moved.read("mark")); got != "moved" {
		t.Errorf("mark is %q in the other runtime", got)
	}
}

// oddNames makes files whose names hold every byte that a name may hold, a
// link, a mode and a sparse file, and describeNames describes them.
const (
	oddNames = `mkdir odd && cd odd && export LC_ALL=C
for o in $(seq 1 255); do
	[ $o = 47 ] || : > "$(printf %b "x\\0$(printf %o $o)x")"
done
ln -s 'nowhere at all' link; ln xax hard; mkdir -m 1750 sticky; chmod 0640 xbx; mkfifo pipe
dd if=/dev/null of=sparse bs=1 seek=1000000 2>/dev/null; printf 'a\nb' > xcx; touch -d 2001-02-03T04:05:06 xdx`
	describeNames = `cd odd && LC_ALL=C && export LC_ALL && printf '%s|' * .[!.]* | od -An -c | cksum
readlink link; cat xcx; stat -c '%n %a %F' link sticky xbx pipe; stat -c '%n %s %h' sparse hard; stat -c %Y xdx`
)

func testSnapshotNames(t *testing.T, s *suite) {
	b := s.create(t)
	b.must(oddNames)
	want := b.must(describeNames)
	fork := s.restore(t, b, b.snapshot(sandbox.SnapshotOptions{}))
	if got := fork.must(describeNames); got != want {
		t.Errorf("files changed over snapshot and restore:\ngot\n%s\nwant\n%s", got, want)
	}
}

func testRestoreGarbage(t *testing.T, s *suite) {
	b := s.create(t)
	good := b.snapshot(sandbox.SnapshotOptions{Stop: true})
	truncated := t.TempDir()
	if err := os.CopyFS(truncated, os.DirFS(good)); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(truncated, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return os.Truncate(path, info.Size()/2)
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{
		"empty": t.TempDir(), "missing": filepath.Join(t.TempDir(), "none"), "truncated": truncated,
	} {
		t.Run(name, func(t *testing.T) {
			spec := b.spec
			spec.ID = sandbox.NewID()
			wantKind(t, "Restore", s.Runtime.Restore(deadline(t), spec, dir), sandbox.Invalid, sandbox.NotFound)
			s.wantGone(t, spec.ID)
		})
	}
}

func testRestoreTaken(t *testing.T, s *suite) {
	b := s.create(t)
	dir := b.snapshot(sandbox.SnapshotOptions{})
	b.write("mark", []byte("mine"))
	wantKind(t, "Restore", s.Runtime.Restore(deadline(t), b.spec, dir), sandbox.Exists)
	if got := string(b.read("mark")); got != "mine" {
		t.Errorf("the refused Restore changed the sandbox that has the ID: %q", got)
	}
}

func testSnapshotNotEmpty(t *testing.T, s *suite) {
	b := s.create(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "precious"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "Snapshot", s.Runtime.Snapshot(deadline(t), b.id, dir, sandbox.SnapshotOptions{Stop: true}), sandbox.Invalid)
	s.wantState(t, b.id, sandbox.Running)
}

func testSnapshotCanceled(t *testing.T, s *suite) {
	b := s.create(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := s.Runtime.Snapshot(ctx, b.id, t.TempDir(), sandbox.SnapshotOptions{Stop: true})
	wantKind(t, "Snapshot with a canceled context", err, sandbox.Canceled)
	s.wantState(t, b.id, sandbox.Running)
	b.must("true")
}

// digest describes every file under dir: name, mode, size, time and content.
func digest(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		sum := [32]byte{}
		if d.Type().IsRegular() {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			sum = sha256.Sum256(content)
		}
		all[path] = fmt.Sprintf("%v %d %v %x", info.Mode(), info.Size(), info.ModTime(), sum)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
