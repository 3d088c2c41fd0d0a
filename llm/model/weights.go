package model

import (
	"errors"
	"fmt"
	"math"

	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tensor"
)

// layer is the weights of one layer's part. Vectors that a family does not have
// are nil, as are those that were not loaded yet.
type layer struct {
	attnNorm, ffnNorm   []float32 // before each half
	attnPost, ffnPost   []float32 // after each half: Gemma
	q, k, v, o          tensor.Matrix
	qBias, kBias, vBias []float32 // Qwen 2
	qNorm, kNorm        []float32 // Qwen 3, Gemma 3
	gate, up, down      tensor.Matrix
}

// role says what of a tensor a shard needs.
type role uint8

const (
	vector role = iota // all numbers, as float32
	rows               // a run of rows
	cols               // a run of columns
)

// want is one tensor that a shard needs, and where it goes.
type want struct {
	name       string
	role       role
	rows, cols int  // that the whole tensor must have
	part       span // of rows or columns
	optional   bool
	matrix     *tensor.Matrix
	vector     *[]float32
	norm       bool // a norm's weight, to which Config.NormOffset is added
}

// group is weights that arrive together. The first is the embedding, then come
// the layers in their order, then the head.
type group []want

// groups lists what the shard needs, in the order in which it is needed.
func (m *Model) groups() []group {
	c, s := &m.config, m.shard
	list := make([]group, 0, len(m.layers)+2)
	var embed, head group
	if s.embeds() || (c.Tied && s.concludes(c)) {
		embed = group{{name: "token_embd.weight", role: rows, rows: c.Vocab, cols: c.Dim, part: span{0, c.Vocab}, matrix: &m.embedding}}
	}
	if s.concludes(c) {
		head = group{{name: "output_norm.weight", role: vector, rows: 1, cols: c.Dim, vector: &m.norm, norm: true}}
		if !c.Tied {
			head = append(head, want{name: "output.weight", role: rows, rows: c.Vocab, cols: c.Dim, part: s.vocabulary(c), matrix: &m.head})
		}
	}
	list = append(list, embed)
	for i := range m.layers {
		list = append(list, m.layerGroup(i))
	}
	return append(list, head)
}

func (m *Model) layerGroup(i int) group {
	c, s, l := &m.config, m.shard, &m.layers[i]
	prefix := fmt.Sprintf("blk.%d.", s.First+i)
	q, kv := s.heads(c.Heads, c.HeadDim), s.heads(c.KVHeads, c.HeadDim)
	columns := s.cut(c.FFN, m.columnUnit)
	width, kvWidth := c.Heads*c.HeadDim, c.KVHeads*c.HeadDim
	norm := func(name string, n int, to *[]float32, optional bool) want {
		return want{name: prefix + name + ".weight", role: vector, rows: 1, cols: n, vector: to, optional: optional, norm: true}
	}
	some := func(name string, n, dim int, part span, to *tensor.Matrix) want {
		return want{name: prefix + name + ".weight", role: rows, rows: n, cols: dim, part: part, matrix: to}
	}
	bias := func(name string, n int, part span, to *[]float32) want {
		return want{name: prefix + name + ".bias", role: vector, rows: 1, cols: n, part: part, vector: to, optional: true}
	}
	down := some("ffn_down", c.Dim, c.FFN, columns, &l.down)
	o := some("attn_output", c.Dim, width, q, &l.o)
	down.role, o.role = cols, cols
	return group{
		norm("attn_norm", c.Dim, &l.attnNorm, false),
		some("attn_q", width, c.Dim, q, &l.q), some("attn_k", kvWidth, c.Dim, kv, &l.k), some("attn_v", kvWidth, c.Dim, kv, &l.v),
		bias("attn_q", width, q, &l.qBias), bias("attn_k", kvWidth, kv, &l.kBias), bias("attn_v", kvWidth, kv, &l.vBias),
		norm("attn_q_norm", c.HeadDim, &l.qNorm, true), norm("attn_k_norm", c.HeadDim, &l.kNorm, true), o,
		norm("post_attention_norm", c.Dim, &l.attnPost, true), norm("ffn_norm", c.Dim, &l.ffnNorm, false),
		some("ffn_gate", c.FFN, c.Dim, columns, &l.gate), some("ffn_up", c.FFN, c.Dim, columns, &l.up), down,
		norm("post_ffw_norm", c.Dim, &l.ffnPost, true),
	}
}

// check looks a tensor up and compares its shape with what it must be. ok is
// false for an optional one that the file does not have.
func (w *want) check(src *Source) (shape tensor.Shape, ok bool, err error) {
	const op = "model.check"
	shape, ok = src.Shape(w.name)
	if !ok {
		if !w.optional {
			err = sandbox.Errorf(op, sandbox.Invalid, w.name, "the model has no such tensor")
		}
		return shape, false, err
	}
	if !shape.Type.Known() {
		return shape, false, sandbox.Errorf(op, sandbox.Unsupported, w.name, "numbers of %v", shape.Type)
	}
	if shape.Rows != w.rows || shape.Cols != w.cols {
		return shape, false, sandbox.Errorf(op, sandbox.Invalid, w.name, "%d x %d where %d x %d must be", shape.Rows, shape.Cols, w.rows, w.cols)
	}
	if w.role == vector && shape.Type.Quantised() {
		return shape, false, sandbox.Errorf(op, sandbox.Unsupported, w.name, "a vector of %v", shape.Type)
	}
	return shape, true, nil
}

// cutShape is the shape of what the shard holds of a matrix.
func (w *want) cutShape(whole tensor.Shape) tensor.Shape {
	if w.role == rows {
		whole.Rows = w.part.len()
	} else {
		whole.Cols = w.part.len()
	}
	return whole
}

// bytes is the memory that a tensor takes once loaded.
func (w *want) bytes(shape tensor.Shape) (int, error) {
	if w.role == vector {
		return 4 * shape.Cols, nil
	}
	n, err := w.cutShape(shape).Bytes()
	if err != nil {
		return 0, sandbox.E("model.bytes", sandbox.Unsupported, w.name, err)
	}
	return (n + 63) &^ 63, nil
}

// columnUnit is where the feed-forward columns may be cut: rows at multiples of
// tensor.Lanes, and columns of the second half at whole blocks of its type.
func columnUnit(src *Source, s Shard) int {
	shape, ok := src.Shape(fmt.Sprintf("blk.%d.ffn_down.weight", s.First))
	if !ok || !shape.Type.Known() {
		return tensor.Lanes
	}
	a, b := tensor.Lanes, shape.Type.BlockLen()
	return a / gcd(a, b) * b
}

func gcd(a, b int) int {
	for b > 0 {
		a, b = b, a%b
	}
	return a
}

// pieceBytes is how much of a tensor is read before it is packed.
const pieceBytes = 1 << 20

// load reads one tensor into memory, which has exactly the size that bytes said. The pool's threads pack it.
func (w *want) load(src *Source, pool *tensor.Pool, whole tensor.Shape, memory []byte, offset float32) error {
	const op = "model.load"
	row := whole.Type.Bytes(whole.Cols)
	if w.role == vector {
		raw := make([]byte, row)
		if err := src.ReadRows(raw, w.name, 0); err != nil {
			return err
		}
		v := make([]float32, whole.Cols)
		if err := tensor.Dequantise(v, whole.Type, raw); err != nil {
			return sandbox.E(op, sandbox.Invalid, w.name, err)
		}
		for i := range v {
			if math.IsNaN(float64(v[i])) || math.IsInf(float64(v[i]), 0) {
				return sandbox.Errorf(op, sandbox.Invalid, w.name, "a number is %v", v[i])
			}
			if w.norm {
				v[i] += offset
			}
		}
		if w.part.len() > 0 {
			v = v[w.part.from:w.part.to]
		}
		*w.vector = v
		return nil
	}
	shape := w.cutShape(whole)
	n, err := shape.Bytes()
	if err != nil {
		return sandbox.E(op, sandbox.Unsupported, w.name, err)
	}
	m, err := tensor.NewMatrix(shape, memory[:n])
	if err != nil {
		return sandbox.E(op, sandbox.Internal, w.name, err)
	}
	first, left := 0, 0 // the first row, and the first byte of each row, that are ours
	if w.role == rows {
		first = w.part.from
	} else {
		left = whole.Type.Bytes(w.part.from)
	}
	width := shape.Type.Bytes(shape.Cols)
	step := max(tensor.Lanes, pieceBytes/row/tensor.Lanes*tensor.Lanes)
	raw := make([]byte, min(step, shape.Rows)*row)
	for at := 0; at < shape.Rows; at += step {
		count := min(step, shape.Rows-at)
		if err := src.ReadRows(raw[:count*row], w.name, first+at); err != nil {
			return err
		}
		if width < row {
			for r := range count {
				copy(raw[r*width:(r+1)*width], raw[r*row+left:])
			}
		}
		if err := pack(pool, m, at, raw[:count*width]); err != nil {
			return sandbox.E(op, sandbox.Invalid, w.name, err)
		}
	}
	*w.matrix = m
	return nil
}

// pack fills whole rows of m from first on.
func pack(pool *tensor.Pool, m tensor.Matrix, first int, raw []byte) error {
	width := m.Type.Bytes(m.Cols)
	n := len(raw) / width
	errs := make([]error, n/tensor.Lanes+1)
	pool.Run(n, tensor.Lanes, func(lo, hi int) {
		errs[lo/tensor.Lanes] = m.PackRows(first+lo, raw[lo*width:hi*width])
	})
	return errors.Join(errs...)
}
