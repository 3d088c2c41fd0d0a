package transfer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"testing"
)

// conformance: W1
func TestTheNextCheckpointIsPackedAsItsDifference(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	var old, next []byte
	for range mib / 2 {
		bits := uint16(math.Float32bits(float32(r.NormFloat64()*0.02)) >> 16)
		old = binary.LittleEndian.AppendUint16(old, bits)
		if r.IntN(3) == 0 {
			bits ^= 1
		}
		next = binary.LittleEndian.AppendUint16(next, bits)
	}
	p := pair{"weights", old, next}
	whole, _ := encodePair(t, p, Options{Method: Whole})
	for _, random := range []bool{false, true} {
		delta, _ := encodePair(t, p, Options{Random: random})
		decodesTo(t, p, delta)
		t.Logf("measured: W1 next checkpoint: %d bytes, delta %d bytes, alone %d bytes", len(next), len(delta), len(whole))
		if 5*len(delta) > len(next) || 3*len(delta) > len(whole) {
			t.Errorf("%d bytes, %d alone", len(delta), len(whole))
		}
	}
	before, _ := encodePair(t, p, Options{})
	before[len(magic)]--
	if _, err := Decode(t.Context(), bytes.NewReader(before), imageOf(p.old), make(memory, len(next)), DecodeOptions{}); !errors.Is(err, ErrVersion) {
		t.Errorf("a delta of the version before: %v", err)
	}
}
