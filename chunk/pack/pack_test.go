package pack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

const mib = 1 << 20

// weights are normally distributed, as those of trained models are; step tells versions of the same ones apart.
func weights(step int, bits int) []byte {
	r, noise := rand.New(rand.NewPCG(1, 1)), rand.New(rand.NewPCG(2, 2))
	var out []byte
	for len(out) < mib {
		w := float32(r.NormFloat64() * 0.02)
		for range step {
			w += float32(noise.NormFloat64() * 2e-6)
		}
		if bits == 16 {
			out = binary.LittleEndian.AppendUint16(out, uint16(math.Float32bits(w)>>16))
		} else {
			out = binary.LittleEndian.AppendUint32(out, math.Float32bits(w))
		}
	}
	return out
}

func random(n int) []byte {
	r := rand.New(rand.NewPCG(3, 3))
	out := make([]byte, n)
	for i := range out {
		out[i] = byte(r.Uint32())
	}
	return out
}

// goroot is where Go is, whose source and programs are real data that every machine with these tests has.
func goroot(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Skip("the go command is not here:", err)
	}
	return strings.TrimSpace(string(out))
}

// source is text: that of Go's own library.
func source(t testing.TB) []byte {
	t.Helper()
	var out []byte
	err := filepath.WalkDir(filepath.Join(goroot(t), "src", "net"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(path, ".go") || len(out) > 4*mib {
			return err
		}
		text, err := os.ReadFile(path)
		out = append(out, text...)
		return err
	})
	if err != nil {
		t.Skip("the source of Go's library is not here:", err)
	}
	return out[:min(len(out), 4*mib)]
}

// program is machine code and tables: Go's own command, the beginning, since compressed debugging information ends it.
func program(t testing.TB) []byte {
	t.Helper()
	p, err := os.ReadFile(filepath.Join(goroot(t), "bin", "go"))
	if err != nil {
		t.Skip("Go's command is not here:", err)
	}
	return p[:min(len(p), 8*mib)]
}

// listing is what logs and records look like: the same few words again and again. It is the list of what Go's library
// exports.
func listing(t testing.TB) []byte {
	t.Helper()
	var out []byte
	for _, name := range []string{"go1.txt", "go1.1.txt", "go1.18.txt"} {
		p, err := os.ReadFile(filepath.Join(goroot(t), "api", name))
		if err != nil {
			t.Skip("the description of Go's library is not here:", err)
		}
		out = append(out, p...)
	}
	return out
}

// packed packs data in chunks of 1 MiB by the plan chosen for each.
func packed(t *testing.T, data, prior []byte, l Link) (size int, class Class) {
	t.Helper()
	for at := 0; at < len(data); at += mib {
		part := data[at:min(at+mib, len(data))]
		var before []byte
		looked := part
		if prior != nil {
			before = prior[at:min(at+mib, len(prior))]
		}
		s := Look(looked)
		class = s.Class
		envelope, err := Append(nil, part, before, Choose(s, l, CPU{Cores: 2}))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Open(envelope, before, mib); err != nil || !bytes.Equal(got, part) {
			t.Fatalf("it does not open: %v", err)
		}
		size += len(envelope)
	}
	return size, class
}

// conformance: W1
func TestEachTypeOfDataReachesItsRatio(t *testing.T) {
	memory := append(append(program(t)[:4*mib:4*mib], make([]byte, 2*mib)...), source(t)...)
	for _, c := range []struct {
		name        string
		data, prior []byte
		class       Class
		floor       float64
	}{
		{"source code", source(t), nil, Text, 4},
		{"records", listing(t), nil, Text, 5.8},
		{"a program", program(t), nil, Binary, 2.1},
		{"memory: code, zeros, text", memory, nil, Text, 3},
		{"zeros", make([]byte, mib), nil, Zero, 1e5},
		{"bf16 weights", weights(0, 16), nil, BF16, 1.4},
		{"f32 weights", weights(0, 32), nil, F32, 1.15},
		{"bf16 weights against the version before", weights(1, 16), weights(0, 16), BF16, 5.8},
		{"noise", random(mib), nil, Packed, 0.99},
	} {
		size, class := packed(t, c.data, c.prior, Link{Bandwidth: 12.5e6})
		ratio := float64(len(c.data)) / float64(size)
		t.Logf("measured: W1 %s: %.2fx", c.name, ratio)
		if ratio < c.floor || class != c.class {
			t.Errorf("%s is taken as %s and packed %.2fx, want %s and %.2fx", c.name, class, ratio, c.class, c.floor)
		}
	}
}

// conformance: W1
func TestTheSlowerTheLinkTheMoreIsSpentOnPacking(t *testing.T) {
	s := Sample{Class: Binary, Size: mib, Ratio: 0.4}
	for _, c := range []struct {
		bandwidth float64
		cores     float64
		want      Plan
	}{
		{50e9, 2, Plan{}},
		{900e6, 2, Plan{Coder: S2}},
		{200e6, 2, Plan{Coder: Zstd, Level: zstd.SpeedFastest}},
		{20e6, 2, Plan{Coder: Zstd, Level: zstd.SpeedBetterCompression}},
		{1e6, 2, Plan{Coder: Zstd, Level: zstd.SpeedBestCompression}},
		{20e6, 0.2, Plan{Coder: Zstd, Level: zstd.SpeedFastest}},
	} {
		if got := Choose(s, Link{Bandwidth: c.bandwidth}, CPU{Cores: c.cores}); got != c.want {
			t.Errorf("%.0f MB/s and %.1f cores: %+v, want %+v", c.bandwidth/1e6, c.cores, got, c.want)
		}
	}
	if got := Choose(Sample{Class: Packed, Ratio: 1}, Link{Bandwidth: 1}, CPU{Cores: 64}); got != (Plan{}) {
		t.Errorf("what is compressed already is compressed again: %+v", got)
	}
}

// conformance: W1
func TestWhatIsMeasuredIsForgottenAfterThirtySeconds(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	m := NewMeter(func() time.Time { return now })
	if m.Link() != DefaultLink || m.CPU(2) != (CPU{2, 1}) {
		t.Error("an unused meter has measured something")
	}
	m.Sent(50e6, now.Add(-time.Second))
	m.Worked(Plan{Coder: S2}, 275e6, time.Second)
	if got := m.Link().Bandwidth; got != 50e6 {
		t.Errorf("the link carries %g", got)
	}
	if got := m.CPU(2).Speed; got != 0.5 {
		t.Errorf("the processor is %g as fast", got)
	}
	now = now.Add(10 * time.Second)
	m.Sent(1e6, now.Add(-time.Second))
	if got := m.Link().Bandwidth; got > 25e6 || got < 1e6 {
		t.Errorf("after slower sending the link carries %g", got)
	}
	now = now.Add(Remeasure)
	if m.Link() != DefaultLink || m.CPU(1).Speed != 1 {
		t.Error("an old measurement still counts")
	}
}

func TestEveryPlanOpens(t *testing.T) {
	data := append(weights(0, 32)[:10_001], source(t)[:5000]...)
	for _, planes := range []int{0, 2, 4} {
		for _, k := range coders {
			for _, prior := range [][]byte{nil, data[:7000], append(bytes.Clone(data), 1, 2, 3), {}} {
				envelope, err := Append([]byte("before"), data, prior, Plan{Planes: planes, Coder: k.coder, Level: k.level})
				if err != nil {
					t.Fatal(err)
				}
				envelope = envelope[len("before"):]
				if got, err := Open(envelope, prior, len(data)); err != nil || !bytes.Equal(got, data) {
					t.Fatalf("planes %d, coder %d: %v", planes, k.coder, err)
				}
				if _, err := Open(envelope, prior, len(data)-1); !errors.Is(err, ErrCorrupt) {
					t.Errorf("more than was allowed is opened: %v", err)
				}
				if _, against := Prior(envelope); against {
					if _, err := Open(envelope, []byte("another"), len(data)); !errors.Is(err, ErrPrior) {
						t.Errorf("opened against another version: %v", err)
					}
				}
			}
		}
	}
}

func TestABombIsRefusedBeforeItUnfolds(t *testing.T) {
	bomb, err := Append(nil, append(make([]byte, 8*mib), 1), nil, Plan{Coder: Zstd, Level: zstd.SpeedBestCompression})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(bomb, nil, mib); !errors.Is(err, ErrCorrupt) {
		t.Errorf("9 MiB in %d bytes are opened: %v", len(bomb), err)
	}
	liar := append([]byte{0, byte(Zstd), 10}, bomb[6:]...)
	if _, err := Open(liar, nil, mib); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a payload larger than its envelope says is opened: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	for _, p := range []Plan{{}, {Coder: S2}, {Coder: Zstd, Level: zstd.SpeedDefault}, {Planes: 2, Coder: Zstd, Level: zstd.SpeedFastest}} {
		for _, prior := range [][]byte{nil, []byte("prior version")} {
			envelope, err := Append(nil, []byte("this version, this version, this version"), prior, p)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(envelope)
		}
	}
	f.Add([]byte{transformZero, 0, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, envelope []byte) {
		const limit = 1 << 16
		got, err := Open(envelope, []byte("prior version"), limit)
		if err == nil && len(got) > limit {
			t.Fatalf("%d bytes", len(got))
		}
		again, err := Append(nil, envelope, nil, Plan{Coder: S2})
		if err != nil {
			t.Fatal(err)
		}
		if back, err := Open(again, nil, len(envelope)); err != nil || !bytes.Equal(back, envelope) {
			t.Fatal("a round trip loses something")
		}
	})
}
