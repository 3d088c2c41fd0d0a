package squeeze

import (
	"encoding/binary"
	"math"
)

// Decode sets x to the values of a frame, which may come from anyone and must have exactly as many. All of them are finite.
// No value is off by more than bound, if the sender is honest. It fails with ErrCorrupt; what is in x means nothing then.
func Decode(x []float32, frame []byte) (bound float32, err error) {
	if len(frame) < headSize || frame[0] != version || int(frame[1]) >= len(forms) {
		return 0, ErrCorrupt
	}
	f, kind := Form(frame[1]), frame[kindAt]
	bound = math.Float32frombits(binary.LittleEndian.Uint32(frame[maxErrAt:]))
	if !finite(bound) || math.Signbit(float64(bound)) {
		return 0, ErrCorrupt
	}
	b := frame[headSize:]
	n, size := binary.Uvarint(b)
	if size <= 0 || n != uint64(len(x)) || n > maxValues {
		return 0, ErrCorrupt
	}
	b = b[size:]
	if kind == everything {
		return bound, values(x, b, f)
	}
	k, size := binary.Uvarint(b)
	if size <= 0 || k > n {
		return 0, ErrCorrupt
	}
	at, b, err := positions(b[size:], kind, int(k), len(x))
	if err != nil {
		return 0, err
	}
	kept := make([]float32, k)
	if err := values(kept, b, f); err != nil {
		return 0, err
	}
	clear(x)
	for i, v := range kept {
		x[at[i]] = v
	}
	return bound, nil
}
