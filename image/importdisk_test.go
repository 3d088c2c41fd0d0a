package image

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/gzip"

	"github.com/atoll-run/atoll/sandbox"
)

// rawDisk is a disk of 4 MiB with a boot sector, some content and mostly zeros.
func rawDisk() []byte {
	data := make([]byte, 4<<20)
	source := rand.New(rand.NewPCG(1, 2))
	for i := 1 << 20; i < 1<<20+100_000; i++ {
		data[i] = byte(source.Uint32())
	}
	copy(data[510:], "\x55\xaa")
	return data
}

// conformance: V6
func TestADiskImageIsImportedAsItIs(t *testing.T) {
	s := openStore(t)
	raw := rawDisk()
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	i, err := s.Import(t.Context(), &packed, ImportOptions{Name: "vm"})
	if err != nil {
		t.Fatal(err)
	}
	if i.Root.Kind != sandbox.RootDisk || i.Disk != int64(len(raw)) || i.Size != int64(len(raw)) {
		t.Errorf("it became %+v", i)
	}
	again, err := s.Get("vm")
	if err != nil || again.Root != i.Root {
		t.Errorf("it is kept as %+v, %v", again, err)
	}
	got, err := os.ReadFile(again.Root.Path)
	if err != nil || !bytes.Equal(got, raw) {
		t.Errorf("its content differs, %v", err)
	}
	info, err := os.Stat(again.Root.Path)
	if err != nil {
		t.Fatal(err)
	}
	if room := allocated(info); room > 1<<20 {
		t.Errorf("100 kB of content take %d bytes", room)
	}
	if err := s.Export(t.Context(), "vm", io.Discard); !sandbox.Is(err, sandbox.Unsupported) {
		t.Errorf("exported as layers: %v", err)
	}
	if _, err := s.Tag("vm", "other"); err != nil {
		t.Error(err)
	}
	prune := func(inUse ...string) int {
		t.Helper()
		p, err := s.Prune(t.Context(), inUse, false)
		if err != nil {
			t.Fatal(err)
		}
		return p.Roots
	}
	if n := prune(); n != 0 {
		t.Errorf("%d roots were pruned that have names", n)
	}
	if err := s.Remove(i.ID); err != nil {
		t.Fatal(err)
	}
	if n := prune(i.Root.Digest); n != 0 {
		t.Errorf("%d roots were pruned that are in use", n)
	}
	if n := prune(); n != 1 {
		t.Errorf("%d roots were pruned when nothing needed the disk", n)
	}
}

// conformance: V6
func TestADiskImageThatCannotBeUsedLeavesNothing(t *testing.T) {
	s, dir := openStore(t), t.TempDir()
	raw, whole, stacked := filepath.Join(dir, "raw"), filepath.Join(dir, "whole"), filepath.Join(dir, "stacked")
	if err := os.WriteFile(raw, rawDisk(), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"convert", "-O", "qcow2", raw, whole}, {"create", "-q", "-f", "qcow2", "-F", "raw", "-b", raw, stacked},
	} {
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("scripts/deps installs qemu-img: %v: %s", err, out)
		}
	}
	data, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	base, err := os.ReadFile(stacked)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data []byte
		name string
	}{
		"cut short": {data[:len(data)/2], "vm"}, "stands on another": {base, "vm"}, "no name": {data, ""}, "no disk": {bytes.Repeat([]byte("no disk\n"), 1000), "vm"},
	} {
		if i, err := s.Import(t.Context(), bytes.NewReader(c.data), ImportOptions{Name: c.name}); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s: %+v, %v", name, i, err)
		}
	}
	for _, folder := range []string{"roots", "refs", "tmp"} {
		if left, err := os.ReadDir(s.path(folder)); err != nil || len(left) != 0 {
			t.Errorf("%s has %v, %v", folder, left, err)
		}
	}
	i, err := s.Import(t.Context(), bytes.NewReader(data), ImportOptions{Name: "vm"})
	if err != nil || i.Disk != 4<<20 || i.Size != int64(len(data)) {
		t.Fatalf("the whole image becomes %+v, %v", i, err)
	}
	if err := os.Chmod(i.Root.Path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(i.Root.Path, append(data, 0), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.VerifyRoot(i.Root); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("a disk that was changed: %v", err)
	}
}
