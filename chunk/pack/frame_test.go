package pack

import (
	"bytes"
	"errors"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// conformance: W1
func TestAFrameOpensWithWhatItWasPackedWith(t *testing.T) {
	data := append(weights(0, 32)[:10_001], source(t)[:5000]...)
	prior := bytes.Clone(data)
	prior[77] ^= 5
	for _, planes := range []int{0, 2, 4} {
		for _, k := range coders {
			for _, against := range []bool{false, true} {
				with := With{Prior: prior, Dictionary: data[5000:]}
				frame, err := AppendFrame([]byte("before"), data, with, Plan{Planes: planes, Coder: k.coder, Level: k.level, Against: against})
				if err != nil {
					t.Fatal(err)
				}
				frame = frame[len("before"):]
				if got, err := OpenFrame(frame, with, len(data)); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d planes, coder %d, against %v: %v", planes, k.coder, against, err)
				}
				if len(frame) > len(data)+1 {
					t.Errorf("%d bytes for %d", len(frame), len(data))
				}
				if _, err := OpenFrame(frame, With{Dictionary: with.Dictionary}, len(data)); NeedsPrior(frame) != errors.Is(err, ErrPrior) {
					t.Error(err)
				}
			}
		}
	}
}

// conformance: W1
func TestTheNextWeightsAreCloserToTheLastOnes(t *testing.T) {
	data := weights(0, 1<<16)
	prior := bytes.Clone(data)
	for i := 0; i < len(prior); i += 64 {
		prior[i] ^= 1
	}
	s := Look(data)
	if !s.Planes() || !Nearer(s, data, prior) || Nearer(s, data, bytes.Repeat(data[1:2], len(data))) || Nearer(s, data, prior[1:]) {
		t.Errorf("%+v", s)
	}
}

func FuzzOpenFrame(f *testing.F) {
	with := With{Prior: bytes.Repeat([]byte("prior"), 400), Dictionary: bytes.Repeat([]byte("dictionary"), 300)}
	for _, planes := range []int{0, 2, 4} {
		for _, coder := range []Coder{Stored, S2, Zstd} {
			for _, against := range []bool{false, true} {
				frame, err := AppendFrame(nil, with.Prior, with, Plan{Planes: planes, Coder: coder, Level: zstd.SpeedFastest, Against: against})
				if err != nil {
					f.Fatal(err)
				}
				f.Add(frame)
			}
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		got, err := OpenFrame(frame, with, len(with.Prior))
		if err == nil && len(got) != len(with.Prior) || err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrPrior) {
			t.Fatal(len(got), err)
		}
	})
}
