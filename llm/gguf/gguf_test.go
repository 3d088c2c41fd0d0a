package gguf_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// sample is a small file with every kind of metadata and several types.
func sample(t testing.TB) (*gguf.File, []byte) {
	t.Helper()
	var m gguf.Meta
	for _, kv := range []struct {
		key   string
		value any
	}{
		{gguf.KeyArchitecture, "llama"},
		{"u8", uint8(200)}, {"i8", int8(-3)}, {"u16", uint16(60000)}, {"i16", int16(-300)}, {"u32", uint32(4e9)},
		{"i32", int32(-7)}, {"u64", uint64(1 << 63)}, {"i64", int64(-1 << 40)}, {"f32", float32(1.5)}, {"f64", 2.25}, {"yes", true},
		{"strings", []string{"", "a", "日本"}}, {"none", []string{}}, {"floats", []float32{1, -2}}, {"doubles", []float64{0.5}},
		{"bools", []bool{true, false}}, {"types", []int32{1, 2, 3}}, {"bytes", []uint8{1, 255}}, {"empty", []uint32{}},
	} {
		if err := m.Set(kv.key, kv.value); err != nil {
			t.Fatal(err)
		}
	}
	f, err := gguf.New(m, []gguf.Tensor{
		{Name: "norm", Type: tensor.F32, Dims: []int64{5}},
		{Name: "w", Type: tensor.Q4_0, Dims: []int64{64, 3}},
		{Name: "k", Type: tensor.Q6_K, Dims: []int64{256, 2, 2}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := f.Encode(&b, fill); err != nil {
		t.Fatal(err)
	}
	return f, b.Bytes()
}

// fill writes a tensor whose bytes are the first letter of its name.
func fill(w io.Writer, t *gguf.Tensor) error {
	_, err := w.Write(bytes.Repeat([]byte{t.Name[0]}, int(t.Size)))
	return err
}

func TestWhatIsWrittenIsReadBack(t *testing.T) {
	f, raw := sample(t)
	got, err := gguf.Decode(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, f) {
		t.Errorf("read %+v\nwrote %+v", got, f)
	}
	if w := got.Tensor("w"); w == nil || w.Cols() != 64 || w.Rows() != 3 || w.Elements() != 192 || w.Size != 3*36 || w.Offset%32 != 0 {
		t.Errorf("tensor w: %+v", w)
	}
	if got.Tensor("nothing") != nil || got.Architecture() != "llama" || got.Tensor("k").Rows() != 4 {
		t.Error("lookups are wrong")
	}
}

func TestMetadataIsTyped(t *testing.T) {
	f, _ := sample(t)
	m := &f.Meta
	for key, want := range map[string]int64{"u8": 200, "i8": -3, "u16": 60000, "i16": -300, "u32": 4e9, "i32": -7, "i64": -1 << 40} {
		if n, ok := m.Int(key); !ok || n != want {
			t.Errorf("%s: %d %v", key, n, ok)
		}
	}
	if _, ok := m.Int("u64"); ok {
		t.Error("a number above int64 was returned as one")
	}
	if _, ok := m.Int("f32"); ok {
		t.Error("a fraction is no integer")
	}
	if v, ok := m.Float("f64"); !ok || v != 2.25 {
		t.Error("f64")
	}
	if v, ok := m.Float("u8"); !ok || v != 200 {
		t.Error("an integer is a number too")
	}
	if v, ok := m.Ints("bools"); !ok || !reflect.DeepEqual(v, []int64{1, 0}) {
		t.Error("bools", v)
	}
	if v, ok := m.Floats("doubles"); !ok || v[0] != 0.5 {
		t.Error("doubles")
	}
	if _, ok := m.Strings("types"); ok {
		t.Error("numbers are no strings")
	}
	m.Delete("u8")
	if m.Get("u8") != nil {
		t.Error("deleted, and still there")
	}
	if m.Set("x", struct{}{}) == nil || m.Set("", 1) == nil {
		t.Error("what cannot be stored was taken")
	}
}

func TestAnOpenFileGivesTensors(t *testing.T) {
	f, _ := sample(t)
	name := filepath.Join(t.TempDir(), "m.gguf")
	if err := f.Save(name, fill); err != nil {
		t.Fatal(err)
	}
	r, err := gguf.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for i := range r.Tensors {
		tensor := &r.Tensors[i]
		want := bytes.Repeat([]byte{tensor.Name[0]}, int(tensor.Size))
		read, err := io.ReadAll(r.Section(tensor))
		if err != nil || !bytes.Equal(read, want) {
			t.Errorf("%s: other bytes than were written (%v)", tensor.Name, err)
		}
	}
	left, _ := filepath.Glob(name + ".*")
	if len(left) > 0 {
		t.Error("left behind:", left)
	}
}

func TestAFailedSaveLeavesNothing(t *testing.T) {
	f, _ := sample(t)
	dir := t.TempDir()
	err := f.Save(filepath.Join(dir, "m.gguf"), func(w io.Writer, t *gguf.Tensor) error {
		_, err := w.Write(make([]byte, t.Size+1))
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "were written") {
		t.Error(err)
	}
	if files, _ := os.ReadDir(dir); len(files) > 0 {
		t.Error("left behind:", files)
	}
}

func TestOpenSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	if _, err := gguf.Open(filepath.Join(dir, "none")); !sandbox.Is(err, sandbox.NotFound) {
		t.Error(err)
	}
	if _, err := gguf.Open(dir); !sandbox.Is(err, sandbox.Invalid) {
		t.Error(err)
	}
}

func TestATruncatedFileIsRefused(t *testing.T) {
	_, raw := sample(t)
	for n := range raw[:len(raw)-32] { // the last 32 bytes may be padding
		if f, err := gguf.Decode(bytes.NewReader(raw[:n]), int64(n)); err == nil {
			t.Fatalf("%d of %d bytes were taken: %+v", n, len(raw), f)
		} else if !sandbox.Is(err, sandbox.Invalid) {
			t.Fatal(err)
		}
	}
}

func TestAStreamOfUnknownLengthIsRead(t *testing.T) {
	f, raw := sample(t)
	got, err := gguf.Decode(bytes.NewReader(raw[:f.DataStart]), -1)
	if err != nil || got.End() != f.End() {
		t.Error(got, err)
	}
}

// A hostile is a file put together by hand.
type hostile struct{ bytes.Buffer }

func (h *hostile) put(values ...any) *hostile {
	for _, v := range values {
		if s, ok := v.(string); ok {
			h.put(uint64(len(s)))
			h.WriteString(s)
			continue
		}
		_ = binary.Write(h, binary.LittleEndian, v)
	}
	return h
}

func begin(version uint32, tensors, keys uint64) *hostile {
	h := &hostile{}
	h.WriteString("GGUF")
	return h.put(version, tensors, keys)
}

func TestHostileFilesAreRefusedWithTheReason(t *testing.T) {
	tensor := func(h *hostile, name string, typ uint32, offset uint64, dims ...uint64) *hostile {
		return h.put(name, uint32(len(dims)), dims, typ, offset)
	}
	pad := make([]byte, 4096)
	for reason, h := range map[string]*hostile{
		"not a GGUF file":   (&hostile{}).put(uint32(1), pad),
		"big-endian":        begin(0x03000000, 0, 0),
		"version 1 is not":  begin(1, 0, 0).put(pad),
		"version 9 is not":  begin(9, 0, 0).put(pad),
		"tensors, more":     begin(3, 1<<60, 0).put(pad),
		"keys, more":        begin(3, 0, 60000).put(pad),
		"of a string, more": begin(3, 0, 1).put(uint64(1<<40), pad),
		"stands there twice": begin(3, 0, 2).put("a", uint32(0), uint8(1),
			"a", uint32(0), uint8(1), pad),
		"kind 13":               begin(3, 0, 1).put("a", uint32(13), pad),
		"array of kind 9":       begin(3, 0, 1).put("a", uint32(9), uint32(9), uint64(1), pad),
		"array elements, more":  begin(3, 0, 1).put("a", uint32(9), uint32(10), uint64(1<<20), pad),
		"alignment of 3":        begin(3, 0, 1).put(gguf.KeyAlignment, uint32(4), uint32(3), pad),
		"alignment of 0":        begin(3, 0, 1).put(gguf.KeyAlignment, uint32(4), uint32(0), pad),
		"two tensors are named": tensor(tensor(begin(3, 2, 0), "a", 0, 0, 4), "a", 0, 32, 4).put(pad),
		"overlaps":              tensor(tensor(begin(3, 2, 0), "a", 0, 32, 64), "b", 0, 64, 4).put(pad),
		"is not aligned":        tensor(begin(3, 1, 0), "a", 0, 1, 4).put(pad),
		"type 4 is not known":   tensor(begin(3, 1, 0), "a", 4, 0, 32).put(pad),
		"do not divide":         tensor(begin(3, 1, 0), "a", 2, 0, 33).put(pad),
		"make no sense":         tensor(begin(3, 1, 0), "a", 0, 0, 1<<40, 1<<40).put(pad),
		"dimensions [-1]":       tensor(begin(3, 1, 0), "a", 0, 0, 1<<64-1).put(pad),
		"dimensions [0]":        tensor(begin(3, 1, 0), "a", 0, 0, 0).put(pad),
		"5 dimensions":          tensor(begin(3, 1, 0), "a", 0, 0, 1, 1, 1, 1, 1).put(pad),
		"cut off":               tensor(begin(3, 1, 0), "a", 0, 32, 4096).put(pad),
		"or makes no sense":     tensor(begin(3, 1, 0), "a", 0, 1<<63, 4).put(pad),
	} {
		f, err := gguf.Decode(bytes.NewReader(h.Bytes()), int64(h.Len()))
		if err == nil || !strings.Contains(err.Error(), reason) || !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("want %q, got %v, %v", reason, f, err)
		}
	}
}

// FuzzDecode: whatever is taken lies in the file and is written back to what
// reads as the same.
func FuzzDecode(f *testing.F) {
	_, raw := sample(f)
	f.Add(raw)
	f.Add(begin(3, 1, 0).put("a", uint32(1), []uint64{4}, uint32(0), uint64(0), make([]byte, 64)).Bytes())
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := gguf.Decode(bytes.NewReader(raw), int64(len(raw)))
		if err != nil {
			return
		}
		if got.End() > int64(len(raw)) {
			t.Fatal("tensors end outside of the file")
		}
		again, err := gguf.New(got.Meta, got.Tensors)
		if err != nil {
			if strings.Contains(err.Error(), "name has") || strings.Contains(err.Error(), "key has") {
				return // empty names are read, not written
			}
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := again.Encode(&b, fillAny); err != nil {
			t.Fatal(err)
		}
		if _, err := gguf.Decode(&b, int64(b.Len())); err != nil {
			t.Fatal(err)
		}
	})
}

func fillAny(w io.Writer, t *gguf.Tensor) error {
	_, err := w.Write(make([]byte, t.Size))
	return err
}
