package chunk_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/chunktest"
	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/sandbox"
)

var ctx = context.Background()

// writeUntilKilled is the environment variable that turns this test's binary into a writer.
const writeUntilKilled = "ATOLL_TEST_CHUNK_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writeUntilKilled); dir != "" {
		write(dir)
	}
	os.Exit(m.Run())
}

func openDisk(t *testing.T, dir string, o chunk.DiskOptions) *chunk.Disk {
	t.Helper()
	d, err := chunk.OpenDisk(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// chunkFile is where a disk keeps a chunk.
func chunkFile(dir string, id chunk.ID) string {
	return filepath.Join(dir, "chunks", id.String()[:2], id.String()[2:])
}

// conformance: FR5.4
func TestDiskIsAStore(t *testing.T) {
	for name, o := range map[string]chunk.DiskOptions{
		"plain": {},
		"packed": {Plan: func(data []byte) pack.Plan {
			return pack.Choose(pack.Look(data), pack.Link{}, pack.CPU{Cores: 1})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			chunktest.Run(t, func(t *testing.T) chunktest.Subject {
				dir := t.TempDir()
				var open *chunk.Disk
				t.Cleanup(func() { _ = open.Close() })
				return chunktest.Subject{
					Open: func(t *testing.T) chunk.Store {
						if open != nil {
							_ = open.Close()
						}
						open = openDisk(t, dir, o)
						return open
					},
					Damage: func(t *testing.T, id chunk.ID) {
						b, err := os.ReadFile(chunkFile(dir, id))
						if err != nil {
							t.Fatal(err)
						}
						b[len(b)/2] ^= 4
						if err := os.WriteFile(chunkFile(dir, id), b, 0o600); err != nil {
							t.Fatal(err)
						}
					},
					Later: time.Now,
				}
			})
		})
	}
}

func TestADiskHasOneOwner(t *testing.T) {
	dir := t.TempDir()
	d := openDisk(t, dir, chunk.DiskOptions{})
	if _, err := chunk.OpenDisk(dir, chunk.DiskOptions{}); !sandbox.Is(err, sandbox.Conflict) {
		t.Errorf("a second owner: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := openDisk(t, dir, chunk.DiskOptions{}).Close(); err != nil {
		t.Error(err)
	}
}

func TestAFullDiskRefusesAndKeepsWhatItHas(t *testing.T) {
	dir := t.TempDir()
	d := openDisk(t, dir, chunk.DiskOptions{Limit: 10_000})
	defer d.Close()
	a, b := bytes.Repeat([]byte("a"), 6000), bytes.Repeat([]byte("b"), 6000)
	id, err := d.Put(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	used := d.Used()
	if _, err := d.Put(ctx, b); !sandbox.Is(err, sandbox.Exhausted) {
		t.Errorf("beyond the limit: %v", err)
	}
	if _, err := d.Put(ctx, a); err != nil || d.Used() != used {
		t.Errorf("what is there already: %v, %d bytes", err, d.Used())
	}
	if err := d.Delete(ctx, id); err != nil || d.Used() != 0 {
		t.Errorf("after deletion %d bytes are used, %v", d.Used(), err)
	}
	if _, err := d.Put(ctx, b); err != nil {
		t.Errorf("after deletion: %v", err)
	}
}

func TestForeignFilesAreNoChunksAndNoRefs(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{"chunks/ab/not-a-name", "chunks/stray", "refs/.hidden", "refs/%zz", "tmp/half"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(path)), 0o700); err != nil {
			t.Fatal(err)
		}
		if path == "chunks/stray" {
			path += "/x"
			_ = os.MkdirAll(filepath.Join(dir, "chunks/stray"), 0o700)
		}
		if err := os.WriteFile(filepath.Join(dir, path), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := openDisk(t, dir, chunk.DiskOptions{})
	defer d.Close()
	if refs, err := d.Refs(ctx); err != nil || len(refs) > 0 || d.Used() > 0 {
		t.Errorf("%v, %v, %d bytes", refs, err, d.Used())
	}
	if _, err := os.Stat(filepath.Join(dir, "tmp", "half")); err == nil {
		t.Error("half a file was left")
	}
}

// write saves version after version under one ref, and says so, until it is killed.
func write(dir string) {
	d, err := chunk.OpenDisk(dir, chunk.DiskOptions{})
	if err != nil {
		panic(err)
	}
	v := chunk.NewVault(d)
	for i := 0; ; i++ {
		l := v.Lease()
		p, err := chunk.WritePart(ctx, l, "content", bytes.NewReader(bytes.Repeat([]byte{byte(i), byte(i >> 8)}, 700_000)))
		var id chunk.ID
		if err == nil {
			id, err = chunk.PutManifest(ctx, l, chunk.Manifest{Kind: "test", Parts: []chunk.Part{p}, Created: time.Unix(int64(i), 0)})
		}
		if err == nil {
			err = d.SetRef(ctx, "line", id)
		}
		if err != nil {
			panic(err)
		}
		l.Release()
		if _, err := v.Collect(ctx, time.Now()); err != nil {
			panic(err)
		}
		if _, err := os.Stdout.WriteString(id.String() + "\n"); err != nil {
			panic(err)
		}
	}
}

// conformance: FR5.4
func TestAWriterThatIsKilledLeavesEveryRefWhole(t *testing.T) {
	dir := t.TempDir()
	for round := range 4 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), writeUntilKilled+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		said := make([]byte, 65*(3+round)) // it has saved so many versions
		for n := 0; n < len(said); {
			k, err := out.Read(said[n:])
			if err != nil {
				t.Fatal(err)
			}
			n += k
		}
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait()

		d := openDisk(t, dir, chunk.DiskOptions{})
		refs, err := d.Refs(ctx)
		if err != nil || len(refs) != 1 {
			t.Fatalf("%v, %v", refs, err)
		}
		m, err := chunk.GetManifest(ctx, d, refs["line"])
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Fields(string(said))
		last, err := chunk.ParseID(lines[len(lines)-1])
		if err != nil {
			t.Fatal(err)
		}
		if was, err := chunk.GetManifest(ctx, d, last); err == nil && was.Created.After(m.Created) {
			t.Errorf("the ref went back from %v to %v", was.Created, m.Created)
		}
		if _, err := new(bytes.Buffer).ReadFrom(chunk.NewReader(ctx, d, m.Parts[0])); err != nil {
			t.Errorf("what the ref leads to is not whole: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
