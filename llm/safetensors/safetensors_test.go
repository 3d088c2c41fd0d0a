package safetensors_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/llm/safetensors"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

func fill(w io.Writer, t *safetensors.Tensor) error {
	_, err := w.Write(bytes.Repeat([]byte{t.Name[0]}, int(t.Size)))
	return err
}

func encode(t testing.TB, tensors ...safetensors.Tensor) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := safetensors.Encode(&b, tensors, map[string]string{"format": "pt"}, fill); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWhatIsWrittenIsReadBack(t *testing.T) {
	raw := encode(t,
		safetensors.Tensor{Name: "b", DType: "BF16", Shape: []int64{3, 2}},
		safetensors.Tensor{Name: "a", DType: "F8_E4M3", Shape: []int64{5}},
		safetensors.Tensor{Name: "s", DType: "F32", Shape: []int64{}},
		safetensors.Tensor{Name: "none", DType: "I64", Shape: []int64{0, 4}})
	f, err := safetensors.Decode(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, x := range f.Tensors {
		got += fmt.Sprint(x.Name, x.DType, x.Shape, x.Size, x.Elements(), string(raw[x.Offset:x.Offset+x.Size]), " ")
	}
	if want := "bBF16[3 2] 12 6bbbbbbbbbbbb aF8_E4M3[5] 5 5aaaaa sF32[] 4 1ssss noneI64[0 4] 0 0 "; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if !reflect.DeepEqual(f.About, map[string]string{"format": "pt"}) {
		t.Error(f.About)
	}
	for n := range raw {
		if _, err := safetensors.Decode(bytes.NewReader(raw[:n]), int64(n)); !sandbox.Is(err, sandbox.Invalid) {
			t.Fatalf("%d of %d bytes: %v", n, len(raw), err)
		}
	}
}

func TestHostileFilesAreRefusedWithTheReason(t *testing.T) {
	one := func(body string) string { return `{"a":` + body + `}` }
	for want, header := range map[string]string{
		"not a JSON object":    `[]`,
		"stands there twice":   `{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}`,
		"is not known":         one(`{"dtype":"F7","shape":[1],"data_offsets":[0,1]}`),
		"makes no sense":       one(`{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,8]}`),
		"shape [-1]":           one(`{"dtype":"U8","shape":[-1],"data_offsets":[0,8]}`),
		"for the shape":        one(`{"dtype":"F32","shape":[3],"data_offsets":[0,8]}`),
		"8 bytes from -8":      one(`{"dtype":"U8","shape":[8],"data_offsets":[-8,0]}`),
		"a gap or an overlap":  `{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}`,
		"cut off or has more":  one(`{"dtype":"U8","shape":[4],"data_offsets":[0,4]}`),
		"dimensions are too m": one(`{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,8],"data_offsets":[0,8]}`),
		"more after its end":   `{} {}`,
		"about itself":         `{"__metadata__":{"a":1}}`,
	} {
		var b bytes.Buffer
		_ = binary.Write(&b, binary.LittleEndian, uint64(len(header)))
		b.WriteString(header + "12345678")
		_, err := safetensors.Decode(&b, int64(8+len(header)+8))
		if err == nil || !strings.Contains(err.Error(), want) || !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

func TestAFolderOfSeveralFilesIsOne(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := safetensors.OpenFolder(dir); !sandbox.Is(err, sandbox.NotFound) {
		t.Error(err)
	}
	write("model-1.safetensors", encode(t, safetensors.Tensor{Name: "a", DType: "U8", Shape: []int64{2}}))
	write("model-2.safetensors", encode(t, safetensors.Tensor{Name: "b", DType: "U8", Shape: []int64{3}}))
	write("model.safetensors.index.json", []byte(`{"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}}`))
	f, err := safetensors.OpenFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := f.Read("b")
	if err != nil || string(b) != "bbb" || !reflect.DeepEqual(f.Names(), []string{"a", "b"}) {
		t.Errorf("%q %v %v", b, err, f.Names())
	}
	if _, err := f.Read("c"); !sandbox.Is(err, sandbox.NotFound) {
		t.Error(err)
	}
	for _, bad := range []string{`{"weight_map":{"a":"../../etc/passwd"}}`, `{"weight_map":{"a":"/etc/passwd"}}`, `{}`, `[`} {
		write("model.safetensors.index.json", []byte(bad))
		if _, err := safetensors.OpenFolder(dir); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestEightBitFloatsAreThoseOfTheStandard(t *testing.T) {
	for b, want := range map[byte]float32{0: 0, 0x01: 1.0 / 512, 0x07: 7.0 / 512, 0x08: 1.0 / 64, 0x38: 1, 0x7E: 448, 0xFE: -448, 0xB8: -1, 0x3C: 1.5} {
		if got := tensor.FromE4M3(b); got != want {
			t.Errorf("E4M3 %#02x is %v, want %v", b, got, want)
		}
	}
	for b, want := range map[byte]float32{0: 0, 0x01: 1.0 / 65536, 0x3C: 1, 0x3E: 1.5, 0x7B: 57344, 0x7C: float32(math.Inf(1)), 0xBC: -1} {
		if got := tensor.FromE5M2(b); got != want {
			t.Errorf("E5M2 %#02x is %v, want %v", b, got, want)
		}
	}
	for i := range 256 {
		b := byte(i)
		if v := tensor.FromE4M3(b); v == v && tensor.ToE4M3(v) != b {
			t.Errorf("E4M3 %#02x comes back as %#02x", b, tensor.ToE4M3(v))
		}
		if v := tensor.FromE5M2(b); v == v && !math.IsInf(float64(v), 0) && tensor.ToE5M2(v) != b {
			t.Errorf("E5M2 %#02x comes back as %#02x", b, tensor.ToE5M2(v))
		}
	}
	for in, want := range map[float32]float32{1e9: 448, -1e9: -448, 17: 16, 19: 20, 1.0625: 1, 1.1875: 1.25, 1e-9: 0} {
		if got := tensor.FromE4M3(tensor.ToE4M3(in)); got != want {
			t.Errorf("%v is rounded to %v, want %v", in, got, want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encode(f, safetensors.Tensor{Name: "a", DType: "F16", Shape: []int64{2, 2}}, safetensors.Tensor{Name: "b", DType: "U8", Shape: []int64{1}}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := safetensors.Decode(bytes.NewReader(raw), int64(len(raw)))
		if err != nil {
			return
		}
		for _, x := range got.Tensors {
			if x.Offset < 8 || x.Offset+x.Size > int64(len(raw)) {
				t.Fatalf("%+v lies outside of %d bytes", x, len(raw))
			}
			if _, err := safetensors.Floats(x.DType, raw[x.Offset:x.Offset+x.Size]); err != nil && strings.HasPrefix(string(x.DType), "F") && x.DType != "F8_E8M0" {
				t.Fatal(err)
			}
		}
	})
}
