package pack

import (
	"math"

	"github.com/klauspost/compress/zstd"
)

// A Link is where bytes go.
type Link struct {
	Bandwidth float64 // bytes per second; 0 means that it is not known, and DefaultLink is meant
}

// A CPU is what there is to pack with.
type CPU struct {
	Cores float64 // that are free for it; may be a fraction, never taken as less than 1/10
	Speed float64 // of one core, relative to that of the table of coders; 0 means 1
}

// DefaultLink is assumed until something was sent: 100 Mbit/s.
var DefaultLink = Link{Bandwidth: 12.5e6}

// coders are the plans there are, the cheapest first: bytes per second of one core of about 2020, and how much more or less
// than the fastest zstd they leave. Measured on disks and memories.
var coders = []struct {
	coder Coder
	level zstd.EncoderLevel
	speed float64
	leave float64 // exponent of the fastest zstd's ratio
}{
	{Stored, 0, 8e9, 0},
	{S2, 0, 550e6, 0.78},
	{Zstd, zstd.SpeedFastest, 320e6, 1},
	{Zstd, zstd.SpeedDefault, 200e6, 1.05},
	{Zstd, zstd.SpeedBetterCompression, 85e6, 1.08},
	{Zstd, zstd.SpeedBestCompression, 18e6, 1.13},
}

// worthwhile is how much sooner bytes must arrive to spend more of the processor on them.
const worthwhile = 0.98

// Choose returns the plan with which bytes like the sample are soonest at the other end, sending while packing; of plans
// that are about as soon, the one that costs the least. It is a pure function.
func Choose(s Sample, l Link, c CPU) Plan {
	if s.Class == Packed || s.Class == Zero {
		return Plan{}
	}
	if l.Bandwidth <= 0 {
		l = DefaultLink
	}
	if c.Speed <= 0 {
		c.Speed = 1
	}
	var best Plan
	soonest := math.Inf(1)
	for _, k := range coders {
		packing := 1 / (k.speed * c.Speed * max(c.Cores, 0.1))
		sending := math.Pow(s.Ratio, k.leave) / l.Bandwidth
		if t := max(packing, sending); t < soonest*worthwhile {
			soonest, best = t, Plan{Coder: k.coder, Level: k.level}
		}
	}
	if planes := s.Class.planes(); planes > 0 && best.Coder != Stored {
		// Planes are for the entropy coder: without one, or with a longer search, nothing more is found.
		return Plan{Planes: planes, Coder: Zstd, Level: zstd.SpeedFastest}
	}
	return best
}
