package model_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/atoll-run/atoll/llm/cache"
	"github.com/atoll-run/atoll/llm/gguf"
	"github.com/atoll-run/atoll/llm/model"
	"github.com/atoll-run/atoll/tensor"
)

// small is a model of one family, as testdata/reference.py describes it.
type small struct {
	Config struct {
		Type     string  `json:"model_type"`
		Dim      int     `json:"hidden_size"`
		Layers   int     `json:"num_hidden_layers"`
		FFN      int     `json:"intermediate_size"`
		Heads    int     `json:"num_attention_heads"`
		KV       int     `json:"num_key_value_heads"`
		HeadDim  int     `json:"head_dim"`
		Eps      float32 `json:"rms_norm_eps"`
		Context  int     `json:"max_position_embeddings"`
		Base     float32 `json:"rope_theta"`
		Window   int     `json:"sliding_window"`
		AttnCap  float32 `json:"attn_logit_softcapping"`
		LogitCap float32 `json:"final_logit_softcapping"`
		Scaling  *struct {
			Kind    string  `json:"rope_type"`
			Factor  float32 `json:"factor"`
			Low     float64 `json:"low_freq_factor"`
			High    float64 `json:"high_freq_factor"`
			Context int     `json:"original_max_position_embeddings"`
		} `json:"rope_scaling"`
	}
	Shapes map[string][]int
	Logits [][]float32
}

type reference struct {
	Tokens   []int32
	At       []int
	Families map[string]*small
}

func readReference(t testing.TB) reference {
	t.Helper()
	b, err := os.ReadFile("testdata/families.json")
	if err != nil {
		t.Fatal(err)
	}
	var r reference
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// numbers makes the weights of a tensor, as reference.py does.
func numbers(name string, n int) []float32 {
	seed := uint64(0xCBF29CE484222325)
	for _, c := range []byte(name) {
		seed = (seed ^ uint64(c)) * 0x100000001B3
	}
	w := make([]float32, n)
	for i := range w {
		z := seed + uint64(i+1)*0x9E3779B97F4A7C15
		z = (z ^ z>>30) * 0xBF58476D1CE4E5B9
		z = (z ^ z>>27) * 0x94D049BB133111EB
		z ^= z >> 31
		u := float64(z>>40)/(1<<24)*2 - 1
		if strings.Contains(name, "norm") {
			w[i] = float32(1 + u/4)
		} else {
			w[i] = float32(u / 4)
		}
	}
	return w
}

// pairs brings the rows of heads from halves to neighbours, as those do who write
// Llama's GGUF files.
func pairs(w []float32, heads, cols int) []float32 {
	out := make([]float32, len(w))
	dim := len(w) / cols / heads
	for h := range heads {
		for i := range dim / 2 {
			for half := range 2 {
				copy(out[(h*dim+2*i+half)*cols:][:cols], w[(h*dim+half*dim/2+i)*cols:][:cols])
			}
		}
	}
	return out
}

var names = strings.NewReplacer("model.layers.", "blk.", "model.embed_tokens", "token_embd", "model.norm", "output_norm", "lm_head", "output",
	"self_attn.q_proj", "attn_q", "self_attn.k_proj", "attn_k", "self_attn.v_proj", "attn_v", "self_attn.o_proj", "attn_output",
	"self_attn.q_norm", "attn_q_norm", "self_attn.k_norm", "attn_k_norm", "mlp.gate_proj", "ffn_gate", "mlp.up_proj", "ffn_up",
	"mlp.down_proj", "ffn_down", "input_layernorm", "attn_norm")

// file is the small model as a GGUF file.
func (s *small) file(t testing.TB) []byte {
	t.Helper()
	c := &s.Config
	arch := map[string]string{"mistral": "llama", "gemma3_text": "gemma3"}[c.Type]
	if arch == "" {
		arch = c.Type
	}
	if c.HeadDim == 0 {
		c.HeadDim = c.Dim / c.Heads
	}
	var meta gguf.Meta
	set := func(key string, v any) {
		if err := meta.Set(key, v); err != nil {
			t.Fatal(err)
		}
	}
	set("general.architecture", arch)
	for key, n := range map[string]int{"block_count": c.Layers, "embedding_length": c.Dim, "feed_forward_length": c.FFN, "attention.head_count": c.Heads,
		"attention.head_count_kv": c.KV, "attention.key_length": c.HeadDim, "attention.value_length": c.HeadDim, "context_length": c.Context} {
		set(arch+"."+key, uint32(n))
	}
	if c.Window > 0 {
		set(arch+".attention.sliding_window", uint32(c.Window))
	}
	set(arch+".attention.layer_norm_rms_epsilon", c.Eps)
	set(arch+".rope.freq_base", c.Base)
	if c.AttnCap > 0 {
		set(arch+".attn_logit_softcapping", c.AttnCap)
		set(arch+".final_logit_softcapping", c.LogitCap)
	}
	weights := map[string][]float32{}
	if r := c.Scaling; r != nil && r.Kind == "llama3" { // written down as factors by whoever makes GGUF files
		factors := make([]float32, c.HeadDim/2)
		for i := range factors {
			turns := float64(r.Context) * math.Pow(float64(c.Base), -2*float64(i)/float64(c.HeadDim)) / (2 * math.Pi)
			keep := min(1, max(0, (turns-r.Low)/(r.High-r.Low)))
			factors[i] = float32(1 / (keep + (1-keep)/float64(r.Factor)))
		}
		weights["rope_freqs.weight"] = factors
	} else if r != nil {
		set(arch+".rope.scaling.type", r.Kind)
		set(arch+".rope.scaling.factor", r.Factor)
		if r.Context > 0 {
			set(arch+".rope.scaling.original_context_length", uint32(r.Context))
		}
	}
	gemma := strings.HasPrefix(arch, "gemma")
	var tensors []gguf.Tensor
	for name, shape := range s.Shapes {
		w := numbers(name, product(shape))
		if gemma && strings.Contains(name, "norm") {
			for i := range w {
				w[i]++
			}
		}
		if arch == "llama" && strings.Contains(name, "q_proj") {
			w = pairs(w, c.Heads, shape[1])
		} else if arch == "llama" && strings.Contains(name, "k_proj") {
			w = pairs(w, c.KV, shape[1])
		}
		if gemma {
			name = strings.NewReplacer("post_attention_layernorm", "post_attention_norm", "pre_feedforward_layernorm", "ffn_norm", "post_feedforward_layernorm", "post_ffw_norm").Replace(name)
		}
		name = strings.Replace(names.Replace(name), "post_attention_layernorm", "ffn_norm", 1)
		weights[name] = w
		dims := []int64{int64(shape[len(shape)-1])}
		if len(shape) == 2 {
			dims = append(dims, int64(shape[0]))
		}
		tensors = append(tensors, gguf.Tensor{Name: name, Dims: dims})
	}
	if f := weights["rope_freqs.weight"]; f != nil {
		tensors = append(tensors, gguf.Tensor{Name: "rope_freqs.weight", Dims: []int64{int64(len(f))}})
	}
	sort.Slice(tensors, func(i, j int) bool { return tensors[i].Name < tensors[j].Name })
	f, err := gguf.New(meta, tensors)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := f.Encode(&out, func(w io.Writer, tensor *gguf.Tensor) error {
		return binary.Write(w, binary.LittleEndian, weights[tensor.Name])
	}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func product(shape []int) int {
	n := 1
	for _, d := range shape {
		n *= d
	}
	return n
}

func source(t testing.TB, file []byte) *model.Source {
	t.Helper()
	f, err := gguf.Decode(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	src, err := model.FromGGUFData(f, bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	return src
}

var threads = sync.OnceValue(func() *tensor.Pool { return tensor.NewPool(2, tensor.Best()) })

func open(t testing.TB, src *model.Source, o model.Options) *model.Model {
	t.Helper()
	o.Pool = threads()
	m, err := model.Open(src, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// text is one text under way in a model of its own cache.
type text struct {
	kv  *cache.Pool
	seq *cache.Sequence
}

func begin(t testing.TB, m *model.Model) *text {
	t.Helper()
	kv, err := cache.New(m.Layout(tensor.F32, 16), 64, cache.Root(""))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = kv.Close() })
	return &text{kv: kv, seq: kv.NewSequence("")}
}

// part is the next tokens, of which all logits are wanted.
func (x *text) part(n int) model.Part {
	x.seq.Grow(n)
	return model.Part{Pages: x.seq.Pages(), Start: x.seq.Len(), Tokens: n, Last: n}
}

// next computes the logits of the next tokens, [tokens][Vocab].
func (x *text) next(t testing.TB, m *model.Model, tokens []int32) []float32 {
	t.Helper()
	r, err := m.Forward(context.Background(), x.kv, &model.Batch{Tokens: tokens, Parts: []model.Part{x.part(len(tokens))}})
	if err != nil {
		t.Fatal(err)
	}
	x.seq.Commit(tokens...)
	return append([]float32(nil), r.Logits...)
}

// furthest is the largest difference between two lists of numbers.
func furthest(t testing.TB, got, want []float32) float64 {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d numbers, want %d", len(got), len(want))
	}
	worst := 0.0
	for i := range got {
		d := math.Abs(float64(got[i]) - float64(want[i]))
		if math.IsNaN(d) {
			return math.Inf(1)
		}
		worst = max(worst, d)
	}
	return worst
}

// tolerance is for logits of up to about 10, computed in float32 in another order.
const tolerance = 2e-3

// conformance: L1
func TestLogitsAreThoseOfTheReferenceInEveryFamily(t *testing.T) {
	ref := readReference(t)
	for name, s := range ref.Families {
		t.Run(name, func(t *testing.T) {
			m := open(t, source(t, s.file(t)), model.Options{})
			vocab := m.Config().Vocab
			for way, chunks := range map[string][]int{"at once": {40}, "in chunks": {1, 6, 1, 17, 15}} {
				x, at := begin(t, m), 0
				var all []float32
				for _, n := range chunks {
					all = append(all, x.next(t, m, ref.Tokens[at:at+n])...)
					at += n
				}
				for i, p := range ref.At {
					if d := furthest(t, all[p*vocab:(p+1)*vocab], s.Logits[i]); d > tolerance {
						t.Errorf("%s, position %d: logits differ by %g", way, p, d)
					}
				}
			}
		})
	}
}

// ranks lets goroutines exchange: what they bring to the same point is added up.
type ranks struct {
	n    int
	mu   sync.Mutex
	cond *sync.Cond
	sum  []float32
	came int
	turn int
}

func (r *ranks) exchange(_ context.Context, _ model.Point, data []float32) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.came == 0 {
		r.sum = make([]float32, len(data))
	}
	tensor.Add(r.sum, data)
	sum, turn := r.sum, r.turn
	if r.came++; r.came == r.n {
		r.came, r.turn = 0, r.turn+1
		r.cond.Broadcast()
	}
	for r.turn == turn {
		r.cond.Wait()
	}
	copy(data, sum)
	return nil
}

// conformance: L2
func TestShardsTogetherComputeWhatTheWholeDoes(t *testing.T) {
	ref := readReference(t)
	for _, name := range []string{"llama", "qwen2", "qwen3", "gemma3"} {
		t.Run(name, func(t *testing.T) {
			file := ref.Families[name].file(t)
			whole := open(t, source(t, file), model.Options{})
			want := begin(t, whole).next(t, whole, ref.Tokens)
			layers := whole.Config().Layers
			for _, cuts := range [][]int{{0, layers}, {0, 1, layers}} { // pipeline of one and of two, each of two ranks
				const n = 2
				got := make([][]float32, n)
				exchange := &ranks{n: n}
				exchange.cond = sync.NewCond(&exchange.mu)
				var wg sync.WaitGroup
				for rank := range n {
					var stages []*model.Model
					var texts []*text
					for i := range len(cuts) - 1 {
						shard := model.Shard{First: cuts[i], Last: cuts[i+1], Rank: rank, Ranks: n}
						m := open(t, source(t, file), model.Options{Shard: shard, Exchange: exchange.exchange})
						stages, texts = append(stages, m), append(texts, begin(t, m))
					}
					wg.Go(func() {
						var hidden []float32
						for i, m := range stages {
							b := &model.Batch{Tokens: ref.Tokens, Hidden: hidden, Parts: []model.Part{texts[i].part(len(ref.Tokens))}}
							r, err := m.Forward(context.Background(), texts[i].kv, b)
							if err != nil {
								t.Error(err)
								return
							}
							hidden, got[rank] = r.Hidden, r.Logits
						}
					})
				}
				wg.Wait()
				for rank := range n {
					if d := furthest(t, got[rank], want); d > tolerance {
						t.Errorf("layers cut at %v, rank %d: logits differ by %g", cuts, rank, d)
					}
				}
			}
		})
	}
}

// Texts of different length in one batch do not see each other.
func TestABatchComputesWhatEachTextDoesAlone(t *testing.T) {
	ref := readReference(t)
	m := open(t, source(t, ref.Families["gemma3"].file(t)), model.Options{})
	kv, err := cache.New(m.Layout(tensor.F32, 16), 64, cache.Root(""))
	if err != nil {
		t.Fatal(err)
	}
	defer kv.Close()
	var b model.Batch
	var want []float32
	for _, n := range []int{5, 33, 1, 16} {
		tokens := ref.Tokens[40-n:]
		x := &text{kv: kv, seq: kv.NewSequence("")}
		b.Tokens, b.Parts = append(b.Tokens, tokens...), append(b.Parts, x.part(n))
		want = append(want, begin(t, m).next(t, m, tokens)...)
	}
	r, err := m.Forward(context.Background(), kv, &b)
	if err != nil {
		t.Fatal(err)
	}
	if d := furthest(t, r.Logits, want); d > tolerance {
		t.Errorf("logits differ by %g", d)
	}
}

func TestAModelThatIsNotWholeIsRefused(t *testing.T) {
	file := readReference(t).Families["llama"].file(t)
	f, err := gguf.Decode(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		t.Fatal(err)
	}
	without := func(change func(*gguf.File) *gguf.File) string {
		src, err := model.FromGGUFData(change(f), bytes.NewReader(file))
		if err == nil {
			_, err = model.Weights(src, model.Shard{})
		}
		return fmt.Sprint(err)
	}
	remade := func(edit func(*gguf.Meta, []gguf.Tensor) []gguf.Tensor) func(*gguf.File) *gguf.File {
		return func(f *gguf.File) *gguf.File {
			meta := f.Meta.Clone()
			tensors := edit(&meta, append([]gguf.Tensor(nil), f.Tensors...))
			g, err := gguf.New(meta, tensors)
			if err != nil {
				t.Fatal(err)
			}
			return g
		}
	}
	for want, change := range map[string]func(*gguf.Meta, []gguf.Tensor) []gguf.Tensor{
		"no such tensor": func(_ *gguf.Meta, ts []gguf.Tensor) []gguf.Tensor {
			return ts[1:]
		},
		"must be": func(_ *gguf.Meta, ts []gguf.Tensor) []gguf.Tensor {
			ts[0].Dims = []int64{32}
			return ts
		},
		"not known": func(m *gguf.Meta, ts []gguf.Tensor) []gguf.Tensor {
			_ = m.Set("general.architecture", "mamba")
			return ts
		},
		"heads cannot share": func(m *gguf.Meta, ts []gguf.Tensor) []gguf.Tensor {
			_ = m.Set("llama.attention.head_count_kv", uint32(3))
			return ts
		},
		"missing or out of bounds": func(m *gguf.Meta, ts []gguf.Tensor) []gguf.Tensor {
			_ = m.Set("llama.block_count", uint64(1)<<62)
			return ts
		},
		"layers: 5000": func(m *gguf.Meta, ts []gguf.Tensor) []gguf.Tensor {
			_ = m.Set("llama.block_count", uint32(5000))
			return ts
		},
	} {
		if got := without(remade(change)); !strings.Contains(got, want) {
			t.Errorf("want %q: %s", want, got)
		}
	}
}
