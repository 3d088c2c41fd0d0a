package transfer

import (
	"cmp"
	"slices"
	"time"
)

// A Similarity is what a sample of the new image says about it and its base, as fractions of its bytes that add up to 1.
type Similarity struct {
	Size    int64   // of the new image, in bytes
	Base    int64   // of the base
	Indexed bool    // the base has an index already
	Same    float64 // equal at the same offset
	Zero    float64
	Moved   float64 // found elsewhere in the base, moved by whole pages
	Shifted float64 // found elsewhere in the base, moved by any other distance
	Patched float64 // found in the base but for a few bytes
	Novel   float64 // the rest
	Empty   float64 // zero, whether the base has that too or not; not part of the sum
	// By how much bytes shrink when they are compressed, from 0 (to nothing) to 1 (not at all).
	Plain float64 // novel ones by themselves
	Alike float64 // novel ones with similar pages of the base
	All   float64 // all that are not zero, by themselves
	Patch float64 // patched ones, to what is different
}

// Changed returns the fraction of the image's bytes that are not equal at the same offset.
func (s Similarity) Changed() float64 { return 1 - s.Same }

// A Link is where a delta goes.
type Link struct {
	Bandwidth float64 // bytes per second, more than 0
}

// A Machine is how fast the sender computes: bytes per second on one core, and cores to use.
type Machine struct {
	Cores  float64
	Scan   float64 // reading, comparing and hashing an image
	Index  float64 // indexing the pages that are not zero by their hash
	Anchor float64 // and by anchors
	Fast   float64 // zstd, its default level
	Better float64 // zstd, better level, with dictionaries
}

// DefaultMachine is a core of about 2020. Measure, where it matters.
func DefaultMachine(cores int) Machine {
	return Machine{Cores: float64(cores), Scan: 1.5e9, Index: 2e9, Anchor: 500e6, Fast: 180e6, Better: 45e6}
}

// An Estimate is what sending an image by a method is predicted to take.
type Estimate struct {
	Method Method
	Bytes  int64
	CPU    time.Duration // of all cores together
	Time   time.Duration // until the last byte is sent, sending while encoding
}

// mapBytes is what a page that was moved costs, more or less; runs cost less.
const mapBytes = 1.5

// Predict estimates all methods, the fastest one first; of two that are as fast, that of fewer bytes. Without a base there
// is one only. It is a pure function.
func Predict(s Similarity, l Link, m Machine) []Estimate {
	size, base := float64(s.Size), float64(s.Base)
	novel := size * s.Novel
	filled := size * (1 - s.Empty)
	moved := func(part float64) float64 { return size * part / pageSize * mapBytes }
	shifted := size * s.Shifted
	changed := size * s.Patched * s.Patch
	seconds := func(bytes, speed float64) float64 { return bytes / max(speed, 1) }
	index := func(speeds ...float64) (t float64) {
		if !s.Indexed {
			for _, v := range append(speeds, m.Scan) {
				t += seconds(base, v)
			}
		}
		return t
	}
	scan := seconds(size, m.Scan)
	all := []struct {
		method     Method
		bytes, cpu float64
		first      float64 // seconds before anything can be sent
	}{
		{Delta, novel*s.Alike + changed + moved(s.Moved+s.Shifted), scan + seconds(novel+shifted, m.Anchor) + seconds(novel, m.Better), index(m.Index, m.Anchor)},
		{Dedup, (novel+shifted)*s.Plain + changed + moved(s.Moved), scan + seconds(novel+shifted, m.Fast), index(m.Index)},
		{Whole, filled * s.All, scan + seconds(filled, m.Fast), 0},
	}
	var list []Estimate
	for _, e := range all {
		if s.Base == 0 && e.method != Whole {
			continue
		}
		cores := max(m.Cores, 1)
		sending := max(seconds(e.bytes, l.Bandwidth), e.cpu/cores)
		list = append(list, Estimate{e.method, int64(e.bytes), duration(e.first + e.cpu), duration(e.first/cores + sending)})
	}
	slices.SortStableFunc(list, func(a, b Estimate) int { return cmp.Or(cmp.Compare(a.Time, b.Time), cmp.Compare(a.Bytes, b.Bytes)) })
	return list
}

// duration converts seconds, at most a year.
func duration(seconds float64) time.Duration {
	return time.Duration(min(seconds, 365*24*3600) * float64(time.Second))
}

// A Policy decides how an image is sent when its base is held on both sides.
type Policy int

// The policies.
const (
	// Predicted takes the method that is predicted to be the fastest.
	Predicted Policy = iota
	// ThirtyPercent sends the whole image when more than 30 % of it changed. It knows nothing of content that was moved, so
	// that it can send a hundred times too much; it is for comparison with systems that do so.
	ThirtyPercent
)

// changedLimit is that of ThirtyPercent.
const changedLimit = 0.30

// Choose returns the method by a policy. It is a pure function.
func (p Policy) Choose(s Similarity, l Link, m Machine) Method {
	if p != ThirtyPercent {
		return Predict(s, l, m)[0].Method
	}
	if s.Changed() > changedLimit {
		return Whole
	}
	return Delta
}
