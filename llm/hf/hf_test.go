package hf

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/safetensors"
	"github.com/atoll-run/atoll/llm/tokenizer"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// A stored tensor is what a test puts into a folder.
type stored struct {
	name  string
	dtype safetensors.DType
	shape []int64
	data  []byte
}

func bytesOf(t testing.TB, values any) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, values); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func f32(t testing.TB, name string, values []float32, shape ...int64) stored {
	return stored{name, "F32", shape, bytesOf(t, values)}
}

// folder writes a model: config.json, a tokenizer of three tokens and the weights.
func folder(t testing.TB, config map[string]any, tensors ...stored) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	write("config.json", c)
	write("tokenizer.json", []byte(`{"pre_tokenizer":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}}`))
	write("tokenizer_config.json", []byte(`{"eos_token":{"content":"ab"},"chat_template":[{"name":"tools","template":"x"},{"name":"default","template":"{{ messages }}"}]}`))
	var list []safetensors.Tensor
	data := map[string][]byte{}
	for _, s := range tensors {
		list = append(list, safetensors.Tensor{Name: s.name, DType: s.dtype, Shape: s.shape})
		data[s.name] = s.data
	}
	var b bytes.Buffer
	if err := safetensors.Encode(&b, list, nil, func(w io.Writer, x *safetensors.Tensor) error {
		_, err := w.Write(data[x.Name])
		return err
	}); err != nil {
		t.Fatal(err)
	}
	write("model.safetensors", b.Bytes())
	return dir
}

func config(arch string) map[string]any {
	return map[string]any{"architectures": []string{arch}, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64,
		"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 3, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
}

// import1 turns a folder into a file and opens it.
func import1(t testing.TB, dir string) *gguf.Reader {
	t.Helper()
	m, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	name := filepath.Join(t.TempDir(), "m.gguf")
	if err := m.Save(name, nil); err != nil {
		t.Fatal(err)
	}
	r, err := gguf.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func values(t testing.TB, r *gguf.Reader, name string) []float32 {
	t.Helper()
	x := r.Tensor(name)
	if x == nil {
		t.Fatalf("no tensor %s", name)
	}
	raw, err := io.ReadAll(r.Section(x))
	if err != nil {
		t.Fatal(err)
	}
	out := make([]float32, x.Elements())
	if err := tensor.Dequantise(out, x.Type, raw); err != nil {
		t.Fatal(err)
	}
	return out
}

func random(n int) []float32 {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	out := make([]float32, n)
	for i := range out {
		out[i] = float32(r.NormFloat64())
	}
	return out
}

// conformance: L1
func TestAFolderBecomesAFile(t *testing.T) {
	c := config("LlamaForCausalLM")
	c["rope_scaling"] = map[string]any{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
	c["tie_word_embeddings"] = true
	q := random(64 * 64)
	r := import1(t, folder(t, c,
		f32(t, "model.embed_tokens.weight", random(3*64), 3, 64), f32(t, "lm_head.weight", random(3*64), 3, 64),
		f32(t, "model.norm.weight", random(64), 64), f32(t, "model.layers.0.input_layernorm.weight", random(64), 64),
		f32(t, "model.layers.0.post_attention_layernorm.weight", random(64), 64),
		f32(t, "model.layers.0.self_attn.q_proj.weight", q, 64, 64),
		f32(t, "model.layers.0.self_attn.rotary_emb.inv_freq", random(16), 16)))
	if r.Architecture() != "llama" || r.Tensor("output.weight") != nil || r.Tensor("blk.0.ffn_norm.weight") == nil || r.Tensor("token_embd.weight").Rows() != 3 {
		t.Errorf("%+v", r.Tensors)
	}
	if tmpl, _ := r.Meta.String("tokenizer.chat_template"); tmpl != "{{ messages }}" {
		t.Errorf("the template is %q", tmpl)
	}
	if tok, err := tokenizer.FromGGUF(&r.Meta); err != nil || tok.EOS() != 2 {
		t.Error(tok, err)
	}
	// Row 2j+i of a head of the file is row i*half+j of the folder's.
	got := values(t, r, "blk.0.attn_q.weight")
	for row := range 64 {
		head, i := row/32, row%32
		want := q[(head*32+i%2*16+i/2)*64]
		if got[row*64] != want {
			t.Fatalf("row %d begins with %v, want %v", row, got[row*64], want)
		}
	}
	factors := values(t, r, "rope_freqs.weight")
	if factors[0] != 1 || factors[15] != 8 || len(factors) != 16 {
		t.Error("RoPE is divided by", factors)
	}
}

func TestGemmasNormsAreStoredLessOne(t *testing.T) {
	r := import1(t, folder(t, config("Gemma3ForCausalLM"),
		f32(t, "model.layers.0.post_feedforward_layernorm.weight", []float32{0.5, -1}, 2), f32(t, "model.layers.0.pre_feedforward_layernorm.weight", []float32{0, 1}, 2)))
	if got := values(t, r, "blk.0.post_ffw_norm.weight"); got[0] != 1.5 || got[1] != 0 {
		t.Error(got)
	}
	if got := values(t, r, "blk.0.ffn_norm.weight"); got[0] != 1 || got[1] != 2 {
		t.Error(got)
	}
}

// The packers below are written from the formats' descriptions, apart from what reads
// them. All store code(row, col) with a scale for each group of 32 columns.
const (
	outs, ins, groups = 16, 64, 2
)

func code(row, col int) int      { return (row*7 + col*5 + col/9) % 16 }
func scaleOf(row, g int) float32 { return float32(1+row) / 64 * float32(1+g) }

func scales(t testing.TB, name string, transposed bool) stored {
	s := stored{name: name, dtype: "F16", shape: []int64{outs, groups}}
	h := make([]uint16, outs*groups)
	for r := range outs {
		for g := range groups {
			at := r*groups + g
			if transposed {
				at = g*outs + r
			}
			h[at] = tensor.ToF16(scaleOf(r, g))
		}
	}
	if transposed {
		s.shape = []int64{groups, outs}
	}
	s.data = bytesOf(t, h)
	return s
}

func gptqParts(t testing.TB, prefix string, zero func(row, g int) int, less int, index []int32) []stored {
	weights, zeros := make([]uint32, ins/8*outs), make([]uint32, groups*outs/8)
	for r := range outs {
		for c := range ins {
			weights[c/8*outs+r] |= uint32(code(r, c)) << (c % 8 * 4)
		}
		for g := range groups {
			zeros[g*outs/8+r/8] |= uint32(zero(r, g)-less) & 15 << (r % 8 * 4)
		}
	}
	out := []stored{{prefix + ".qweight", "I32", []int64{ins / 8, outs}, bytesOf(t, weights)}, {prefix + ".qzeros", "I32", []int64{groups, outs / 8}, bytesOf(t, zeros)}, scales(t, prefix+".scales", true)}
	if index != nil {
		out = append(out, stored{prefix + ".g_idx", "I32", []int64{ins}, bytesOf(t, index)})
	}
	return out
}

func awqParts(t testing.TB, prefix string, zero func(row, g int) int) []stored {
	order := []int{0, 2, 4, 6, 1, 3, 5, 7} // which column stands in each nibble, from the lowest
	weights, zeros := make([]uint32, ins*outs/8), make([]uint32, groups*outs/8)
	for w := range outs / 8 {
		for nibble, r := range order {
			for c := range ins {
				weights[c*outs/8+w] |= uint32(code(w*8+r, c)) << (4 * nibble)
			}
			for g := range groups {
				zeros[g*outs/8+w] |= uint32(zero(w*8+r, g)) << (4 * nibble)
			}
		}
	}
	return []stored{{prefix + ".qweight", "I32", []int64{ins, outs / 8}, bytesOf(t, weights)}, {prefix + ".qzeros", "I32", []int64{groups, outs / 8}, bytesOf(t, zeros)}, scales(t, prefix+".scales", true)}
}

func compressedParts(t testing.TB, prefix string, zero func(row, g int) int) []stored {
	weights := make([]uint32, outs*ins/8)
	for r := range outs {
		for c := range ins {
			weights[r*ins/8+c/8] |= uint32(code(r, c)) << (c % 8 * 4)
		}
	}
	out := []stored{{prefix + ".weight_packed", "I32", []int64{outs, ins / 8}, bytesOf(t, weights)}, {prefix + ".weight_shape", "I64", []int64{2}, bytesOf(t, []int64{outs, ins})}, scales(t, prefix+".weight_scale", false)}
	if zero != nil {
		zeros := make([]uint32, outs/8*groups)
		for r := range outs {
			for g := range groups {
				zeros[r/8*groups+g] |= uint32(zero(r, g)) << (r % 8 * 4)
			}
		}
		out = append(out, stored{prefix + ".weight_zero_point", "I32", []int64{outs / 8, groups}, bytesOf(t, zeros)})
	}
	return out
}

func TestWeightsThatSomebodyQuantisedKeepTheirValues(t *testing.T) {
	const prefix = "model.layers.0.mlp.up_proj"
	middle := func(int, int) int { return 8 }
	other := func(r, g int) int { return 1 + (r+3*g)%15 }
	reordered := make([]int32, ins)
	inOrder := make([]int32, ins)
	for c := range reordered {
		reordered[c], inOrder[c] = int32(c%groups), int32(c/32)
	}
	for name, c := range map[string]struct {
		parts  []stored
		config map[string]any
		zero   func(row, g int) int
		typ    tensor.Type
		index  []int32
	}{
		"GPTQ, symmetric":     {gptqParts(t, prefix, middle, 1, inOrder), map[string]any{"quant_method": "gptq", "bits": 4, "sym": true}, middle, tensor.Q4_0, nil},
		"GPTQ, zeros":         {gptqParts(t, prefix, other, 1, nil), map[string]any{"quant_method": "gptq", "bits": 4, "sym": false}, other, tensor.Q4_1, nil},
		"GPTQ, version 2":     {gptqParts(t, prefix, other, 0, nil), map[string]any{"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, other, tensor.Q4_1, nil},
		"GPTQ, 2 that says 1": {gptqParts(t, prefix, middle, 0, nil), map[string]any{"quant_method": "gptq", "bits": 4, "sym": true, "checkpoint_format": "gptq"}, middle, tensor.Q4_0, nil},
		"GPTQ, reordered":     {gptqParts(t, prefix, other, 1, reordered), map[string]any{"quant_method": "gptq", "bits": 4, "desc_act": true}, other, tensor.F16, reordered},
		"AWQ":                 {awqParts(t, prefix, other), map[string]any{"quant_method": "awq", "bits": 4, "version": "gemm"}, other, tensor.Q4_1, nil},
		"compressed":          {compressedParts(t, prefix, nil), map[string]any{"quant_method": "compressed-tensors", "format": "pack-quantized"}, middle, tensor.Q4_0, nil},
		"compressed, zeros":   {compressedParts(t, prefix, other), map[string]any{"quant_method": "compressed-tensors", "format": "pack-quantized"}, other, tensor.Q4_1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			conf := config("LlamaForCausalLM")
			conf["quantization_config"] = c.config
			r := import1(t, folder(t, conf, c.parts...))
			x := r.Tensor("blk.0.ffn_up.weight")
			if x == nil || x.Type != c.typ || x.Cols() != ins || x.Rows() != outs || len(r.Tensors) != 1 {
				t.Fatalf("%+v", r.Tensors)
			}
			for i, got := range values(t, r, x.Name) {
				row, col := i/ins, i%ins
				g := col / 32
				if c.index != nil {
					g = int(c.index[col])
				}
				want := float32(code(row, col)-c.zero(row, g)) * scaleOf(row, g)
				if math.Abs(float64(got-want)) > 1e-3*float64(8*scaleOf(row, g)) || c.typ == tensor.Q4_0 && got != want {
					t.Fatalf("row %d column %d is %v, want %v", row, col, got, want)
				}
			}
		})
	}
}

func TestEightBitWeightsKeepTheirValues(t *testing.T) {
	const prefix = "model.layers.0.mlp.up_proj"
	raw := make([]byte, outs*ins)
	for i := range raw {
		raw[i] = byte(i * 37 % 250)
		if raw[i]&0x7F == 0x7F {
			raw[i]-- // not a number
		}
	}
	finite := make([]byte, len(raw))
	for i := range finite {
		if finite[i] = raw[i]; finite[i]&0x7C == 0x7C {
			finite[i] ^= 0x40
		}
	}
	rows := make([]float32, outs)
	for i := range rows {
		rows[i] = float32(math.Exp2(float64(i%4) - 5))
	}
	odd := make([]float32, outs) // scales that 16 bits do not hold
	for i := range odd {
		odd[i] = 0.1 / float32(i+1)
	}
	for name, c := range map[string]struct {
		parts []stored
		want  func(i int) float32
	}{
		"E4M3, odd scales": {[]stored{{prefix + ".weight", "F8_E4M3", []int64{outs, ins}, raw}, f32(t, prefix+".weight_scale", odd, outs, 1)},
			func(i int) float32 { return tensor.FromE4M3(raw[i]) * odd[i/ins] }},
		"E5M2, odd scales": {[]stored{{prefix + ".weight", "F8_E5M2", []int64{outs, ins}, finite}, f32(t, prefix+".weight_scale", odd, outs, 1)},
			func(i int) float32 { return tensor.FromE5M2(finite[i]) * odd[i/ins] }},
		"bytes": {[]stored{{prefix + ".weight", "I8", []int64{outs, ins}, raw}, f32(t, prefix+".weight_scale", rows, outs, 1)},
			func(i int) float32 { return float32(int8(raw[i])) * rows[i/ins] }},
		"E4M3 by row": {[]stored{{prefix + ".weight", "F8_E4M3", []int64{outs, ins}, raw}, f32(t, prefix+".weight_scale", rows, outs, 1)},
			func(i int) float32 { return tensor.FromE4M3(raw[i]) * rows[i/ins] }},
		"E4M3, one scale": {[]stored{{prefix + ".weight", "F8_E4M3", []int64{outs, ins}, raw}, f32(t, prefix+".weight_scale", []float32{0.5})},
			func(i int) float32 { return tensor.FromE4M3(raw[i]) * 0.5 }},
		"E4M3 by block": {[]stored{{prefix + ".weight", "F8_E4M3", []int64{outs, ins}, raw}, f32(t, prefix+".weight_scale_inv", rows[:4], 2, 2)},
			func(i int) float32 { return tensor.FromE4M3(raw[i]) * rows[i/ins/8*2+i%ins/32] }},
	} {
		t.Run(name, func(t *testing.T) {
			conf := config("LlamaForCausalLM")
			conf["quantization_config"] = map[string]any{"quant_method": "fp8"}
			r := import1(t, folder(t, conf, c.parts...))
			if x := r.Tensor("blk.0.ffn_up.weight"); strings.Contains(name, "odd") && x.Type.String() != "F8_"+name[:4] {
				t.Errorf("kept as %v", x.Type)
			}
			for i, got := range values(t, r, "blk.0.ffn_up.weight") {
				if got != c.want(i) {
					t.Fatalf("number %d is %v, want %v", i, got, c.want(i))
				}
			}
		})
	}
}

// conformance: L4
func TestThreeBitsAreKeptAsThree(t *testing.T) {
	const prefix, bits = "model.layers.0.mlp.up_proj", 3
	// put writes number i of those that are packed one after the other into words stride apart.
	put := func(words []uint32, stride, i, v int) {
		for b := range bits {
			at := i*bits + b
			words[at/32*stride] |= uint32(v>>b&1) << (at % 32)
		}
	}
	for name, c := range map[string]struct {
		zero func(r, g int) int
		typ  tensor.Type
	}{
		"symmetric": {func(int, int) int { return 4 }, tensor.Q3_0},
		"zeros":     {func(r, g int) int { return 1 + (r+3*g)%7 }, tensor.Q3_1},
	} {
		t.Run(name, func(t *testing.T) {
			weights := make([]uint32, ins*bits/32*outs)
			width := (outs*bits + 31) / 32
			zeros := make([]uint32, groups*width)
			for r := range outs {
				for col := range ins {
					put(weights[r:], outs, col, code(r, col)%8)
				}
				for g := range groups {
					put(zeros[g*width:], 1, r, c.zero(r, g)-1)
				}
			}
			conf := config("LlamaForCausalLM")
			conf["quantization_config"] = map[string]any{"quant_method": "gptq", "bits": bits}
			r := import1(t, folder(t, conf, stored{prefix + ".qweight", "I32", []int64{ins * bits / 32, outs}, bytesOf(t, weights)},
				stored{prefix + ".qzeros", "I32", []int64{groups, int64(width)}, bytesOf(t, zeros)}, scales(t, prefix+".scales", true)))
			x := r.Tensor("blk.0.ffn_up.weight")
			if x.Type != c.typ {
				t.Fatalf("kept as %v", x.Type)
			}
			for i, got := range values(t, r, x.Name) {
				row, col := i/ins, i%ins
				want := float32(code(row, col)%8-c.zero(row, col/32)) * scaleOf(row, col/32)
				if math.Abs(float64(got-want)) > 1e-3*float64(8*scaleOf(row, col/32)) {
					t.Fatalf("row %d column %d is %v, want %v", row, col, got, want)
				}
			}
		})
	}
}

func TestWhatCannotBeImportedIsRefusedWithTheReason(t *testing.T) {
	good := f32(t, "model.norm.weight", random(64), 64)
	with := func(key string, v any) map[string]any {
		c := config("LlamaForCausalLM")
		c[key] = v
		return c
	}
	gptq := map[string]any{"quant_method": "gptq", "bits": 4}
	parts := func() []stored {
		return gptqParts(t, "model.layers.0.mlp.up_proj", func(int, int) int { return 8 }, 1, nil)
	}
	short := parts()
	short[1].shape, short[1].data = []int64{1, 2}, short[1].data[:8]
	badIndex := append(parts(), stored{"model.layers.0.mlp.up_proj.g_idx", "I32", []int64{ins}, bytesOf(t, func() (x [ins]int32) { x[3] = 9; return }())})
	for want, c := range map[string]struct {
		config  map[string]any
		tensors []stored
		kind    sandbox.Kind
	}{
		"the architecture \"Mamba\"": {config("Mamba"), []stored{good}, sandbox.Unsupported},
		"num_hidden_layers is 0":     {with("num_hidden_layers", 0), []stored{good}, sandbox.Invalid},
		"RoPE scaling":               {with("rope_scaling", map[string]any{"rope_type": "magic"}), []stored{good}, sandbox.Unsupported},
		"not part of":                {config("LlamaForCausalLM"), []stored{f32(t, "model.layers.0.router.weight", random(64), 64)}, sandbox.Unsupported},
		"do not divide into 2 heads": {config("LlamaForCausalLM"), []stored{f32(t, "model.layers.0.self_attn.q_proj.weight", random(3*64), 3, 64)}, sandbox.Invalid},
		"qzeros is 1 x 2":            {with("quantization_config", gptq), short, sandbox.Invalid},
		"g_idx names group 9":        {with("quantization_config", gptq), badIndex, sandbox.Invalid},
		"a part \"qweight\"":         {config("LlamaForCausalLM"), parts()[:1], sandbox.Unsupported},
		"GPTQ of 5 bits":             {with("quantization_config", map[string]any{"quant_method": "gptq", "bits": 5}), parts(), sandbox.Unsupported},
	} {
		m, err := Open(folder(t, c.config, c.tensors...))
		if err == nil || !strings.Contains(err.Error(), want) || !sandbox.Is(err, c.kind) {
			t.Errorf("want %q, got %v, %v", want, m, err)
		}
	}
	if _, err := Open(t.TempDir()); !sandbox.Is(err, sandbox.NotFound) {
		t.Error(err)
	}
}

func TestAnImportCanBeStopped(t *testing.T) {
	m, err := Open(folder(t, config("LlamaForCausalLM"), f32(t, "model.norm.weight", random(64), 64)))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	dir := t.TempDir()
	stop := errors.New("enough")
	if err := m.Save(filepath.Join(dir, "m.gguf"), func(int64, int64) error { return stop }); !errors.Is(err, stop) {
		t.Error(err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Error("left behind:", left)
	}
}

// FuzzConfig: no config.json does more than fail.
func FuzzConfig(f *testing.F) {
	for _, c := range []map[string]any{config("LlamaForCausalLM"), config("Gemma3ForCausalLM")} {
		b, _ := json.Marshal(c)
		f.Add(b)
	}
	f.Add([]byte(`{"architectures":["LlamaForCausalLM"],"text_config":{"rope_parameters":{"full_attention":{"rope_theta":1}}}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var c modelConfig
		if json.Unmarshal(raw, &c) != nil || c.settle() != nil {
			return
		}
		var m gguf.Meta
		_ = c.store(&m, "x")
		c.ropeFactors()
	})
}
