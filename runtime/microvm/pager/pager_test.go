package pager

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// file writes data into a file and returns it with its sums.
func file(t *testing.T, data []byte) (*os.File, []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	var s Summer
	for rest := data; len(rest) > 0; { // in pieces of another size than chunks
		n := min(len(rest), 10007)
		_, _ = s.Write(rest[:n])
		rest = rest[n:]
	}
	return f, s.Sums()
}

// conformance: W5
func TestNothingIsReadThatDiffersFromItsSum(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789abcdef"), 3*chunkSize/16)[:2*chunkSize+100]
	f, sums := file(t, data)
	c, err := NewChecked(f, int64(len(data)), sums)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 300)
	if _, err := c.ReadAt(got, chunkSize-100); err != nil || !bytes.Equal(got, data[chunkSize-100:][:300]) {
		t.Errorf("read across two chunks: %v", err)
	}
	if _, err := f.WriteAt([]byte("x"), 2*chunkSize+50); err != nil {
		t.Fatal(err)
	}
	if n, err := c.ReadAt(got[:10], 2*chunkSize); n != 0 || !errors.Is(err, ErrDamaged) {
		t.Errorf("of a damaged chunk %d bytes are read, %v", n, err)
	}
	if err := f.Truncate(chunkSize + 10); err != nil {
		t.Fatal(err)
	}
	fresh, err := NewChecked(f, int64(len(data)), sums)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.ReadAt(got[:10], chunkSize+1); !errors.Is(err, ErrDamaged) {
		t.Errorf("of a shorter file: %v", err)
	}
	if _, err := NewChecked(f, int64(len(data)), sums[1:]); !errors.Is(err, ErrDamaged) {
		t.Errorf("with other sums: %v", err)
	}
}

func TestAMemoryIsItsLayersEachUponTheOnesBefore(t *testing.T) {
	page := func(fill byte) []byte { return bytes.Repeat([]byte{fill}, vmm.PageSize) }
	low, lowSums := file(t, append(page(1), page(2)...))
	high, highSums := file(t, append(page(0xff), page(3)...)) // a page of something else comes first
	layers := []Layer{
		{Length: 2 * vmm.PageSize, Sums: lowSums, Runs: []vmm.Run{{First: 1, Count: 2}}},
		{Length: 2 * vmm.PageSize, Sums: highSums, First: vmm.PageSize, Runs: []vmm.Run{{First: 2, Count: 1}}},
	}
	m, err := newMemory(5*vmm.PageSize, layers, []*os.File{low, high}, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5*vmm.PageSize)
	if err := m.read(got, 0, false); err != nil {
		t.Fatal(err)
	}
	for i, want := range []byte{0, 1, 3, 0, 0} {
		if !bytes.Equal(got[i*vmm.PageSize:][:vmm.PageSize], page(want)) {
			t.Errorf("page %d begins with %d, want %d", i, got[i*vmm.PageSize], want)
		}
	}
	for name, wrong := range map[string]Layer{
		"beyond the memory": {Length: 2 * vmm.PageSize, Sums: lowSums, Runs: []vmm.Run{{First: 4, Count: 2}}},
		"beyond the file":   {Length: 2 * vmm.PageSize, Sums: lowSums, Runs: []vmm.Run{{First: 0, Count: 3}}},
		"before the file":   {Length: 2 * vmm.PageSize, Sums: lowSums, First: -vmm.PageSize, Runs: []vmm.Run{{First: 0, Count: 1}}},
	} {
		if _, err := newMemory(5*vmm.PageSize, []Layer{wrong}, []*os.File{low}, nil); err == nil {
			t.Errorf("a layer %s is taken", name)
		}
	}
}
