package gguf_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// split writes a model in parts, each with one tensor but the first, which has none, and returns their names. say may change
// what a part says of itself.
func split(t *testing.T, say func(part int, m *gguf.Meta)) []string {
	t.Helper()
	base := filepath.Join(t.TempDir(), "m")
	var names []string
	for i := range 3 {
		var m gguf.Meta
		for key, value := range map[string]any{"split.no": uint16(i), "split.count": uint16(3), "split.tensors.count": int32(2)} {
			if err := m.Set(key, value); err != nil {
				t.Fatal(err)
			}
		}
		if i == 0 {
			_ = m.Set(gguf.KeyArchitecture, "llama")
		}
		if say != nil {
			say(i, &m)
		}
		var tensors []gguf.Tensor
		if i > 0 {
			tensors = []gguf.Tensor{{Name: string(rune('a' + i)), Type: tensor.F32, Dims: []int64{int64(5 * i)}}}
		}
		f, err := gguf.New(m, tensors)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, fmt.Sprintf("%s-%05d-of-00003.gguf", base, i+1))
		if err := f.Save(names[i], fill); err != nil {
			t.Fatal(err)
		}
	}
	return names
}

// conformance: L1
func TestPartsAreReadAsOneFile(t *testing.T) {
	names := split(t, nil)
	for _, name := range names { // whichever is named
		r, err := gguf.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Tensors) != 2 || r.Architecture() != "llama" || r.Meta.Get("split.count") != nil {
			t.Errorf("%d tensors of %q", len(r.Tensors), r.Architecture())
		}
		for i := range r.Tensors {
			x := &r.Tensors[i]
			got, err := io.ReadAll(r.Section(x))
			if err != nil || !bytes.Equal(got, bytes.Repeat([]byte{x.Name[0]}, int(x.Size))) {
				t.Errorf("%s: %v, %v", x.Name, got, err)
			}
		}
		// Across the parts' border.
		end := r.End()
		whole := make([]byte, end)
		if n, err := r.ReadAt(whole, 0); n != len(whole) || err != nil {
			t.Error(n, err)
		}
		if n, err := r.ReadAt(whole, end); err == nil && n == len(whole) {
			t.Error("read beyond the end")
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestPartsThatDoNotBelongTogetherAreRefused(t *testing.T) {
	for reason, say := range map[string]func(part int, m *gguf.Meta){
		"says that it is part 1 of 3":   func(i int, m *gguf.Meta) { _ = m.Set("split.no", uint16(0)) },
		"part 2 of 3 says that it is":   func(i int, m *gguf.Meta) { _ = m.Set("split.count", uint16(3+i)) },
		"2 tensors in all parts, not 9": func(i int, m *gguf.Meta) { _ = m.Set("split.tensors.count", int32(9)) },
	} {
		_, err := gguf.Open(split(t, say)[0])
		if err == nil || !strings.Contains(err.Error(), reason) || !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("want %q, got %v", reason, err)
		}
	}
	names := split(t, nil)
	if err := os.Remove(names[2]); err != nil {
		t.Fatal(err)
	}
	if _, err := gguf.Open(names[0]); !sandbox.Is(err, sandbox.NotFound) {
		t.Error(err)
	}
}

func TestNamesOfParts(t *testing.T) {
	got := gguf.PartNames("http://x/a-00002-of-00003.gguf")
	if len(got) != 3 || got[0] != "http://x/a-00001-of-00003.gguf" || got[2] != "http://x/a-00003-of-00003.gguf" {
		t.Error(got)
	}
	for _, name := range []string{"a.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-00001-of-99999.gguf", "a-1-of-3.gguf"} {
		if got := gguf.PartNames(name); got != nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}
