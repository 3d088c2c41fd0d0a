package chunk

import (
	"cmp"
	"slices"
	"time"
)

// Kept is a manifest that a ref leads to, as far as retention cares.
type Kept struct {
	Name     string // of the ref
	Line     string // what it is a version of
	Pinned   bool   // stays whatever the rules say
	Manifest Manifest
}

// Rules say how long manifests are kept. Zero fields do not limit.
type Rules struct {
	KeepLast int           // of each line, whatever their age
	MaxAge   time.Duration // older ones go
	MaxBytes int64         // of content, what is shared counted once: the oldest go until the rest is within it
}

// Expired returns the refs that may go under the rules, oldest first. It is a pure function.
func Expired(all []Kept, r Rules, now time.Time) []string {
	sorted := slices.Clone(all)
	slices.SortFunc(sorted, func(a, b Kept) int {
		return cmp.Or(a.Manifest.Created.Compare(b.Manifest.Created), cmp.Compare(a.Name, b.Name))
	})
	uses := make(map[ID]int)
	newer := make(map[string]int) // of the same line
	protected := make([]bool, len(sorted))
	var total int64
	for i, k := range slices.Backward(sorted) {
		protected[i] = k.Pinned || newer[k.Line] < r.KeepLast
		newer[k.Line]++
		for _, c := range k.chunks() {
			if uses[c.ID]++; uses[c.ID] == 1 {
				total += int64(c.Size)
			}
		}
	}
	var out []string
	for i, k := range sorted {
		tooOld := r.MaxAge > 0 && now.Sub(k.Manifest.Created) > r.MaxAge
		tooMuch := r.MaxBytes > 0 && total > r.MaxBytes
		if protected[i] || !tooOld && !tooMuch {
			continue
		}
		out = append(out, k.Name)
		for _, c := range k.chunks() {
			if uses[c.ID]--; uses[c.ID] == 0 {
				total -= int64(c.Size)
			}
		}
	}
	return out
}

// chunks returns all chunks of the manifest, with repetitions.
func (k Kept) chunks() []Ref {
	var all []Ref
	for _, p := range k.Manifest.Parts {
		all = append(all, p.Chunks...)
	}
	return all
}
