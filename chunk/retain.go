package chunk

import (
	"cmp"
	"slices"
	"time"
)

// Kept is something that is kept for a time, such as a snapshot.
type Kept struct {
	Name    string
	Line    string // what it is a version of
	Pinned  bool   // stays whatever the rules say
	Created time.Time
	Holds   []Content
}

// Content is a run of bytes that several may hold, and then is there once.
type Content struct {
	ID   ID
	Size int64
}

// Rules say how long things are kept. Zero fields do not limit.
type Rules struct {
	KeepLast int           // of each line, whatever their age
	MaxAge   time.Duration // older ones go
	MaxBytes int64         // of content, what is shared counted once: the oldest go until the rest is within it
}

// Expired returns the indexes of those that may go under the rules, oldest first. Pinned ones count towards KeepLast and MaxBytes. It
// is a pure function.
func Expired(all []Kept, r Rules, now time.Time) []int {
	order := make([]int, len(all))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(i, j int) int {
		a, b := all[i], all[j]
		if a.Created.Equal(b.Created) && a.Pinned != b.Pinned { // times are in seconds: what is pinned counts as the newer one
			if b.Pinned {
				return -1
			}
			return 1
		}
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Name, b.Name))
	})
	uses := make(map[ID]int)
	newer := make(map[string]int) // of the same line
	protected := make([]bool, len(all))
	var total int64
	for _, i := range slices.Backward(order) {
		k := all[i]
		protected[i] = k.Pinned || newer[k.Line] < r.KeepLast
		newer[k.Line]++
		for _, c := range k.Holds {
			if uses[c.ID]++; uses[c.ID] == 1 {
				total += c.Size
			}
		}
	}
	var out []int
	for _, i := range order {
		tooOld := r.MaxAge > 0 && now.Sub(all[i].Created) > r.MaxAge
		tooMuch := r.MaxBytes > 0 && total > r.MaxBytes
		if protected[i] || !tooOld && !tooMuch {
			continue
		}
		out = append(out, i)
		for _, c := range all[i].Holds {
			if uses[c.ID]--; uses[c.ID] == 0 {
				total -= c.Size
			}
		}
	}
	return out
}

// Content returns the chunks of a manifest, with repetitions.
func (m Manifest) Content() []Content {
	var all []Content
	for _, p := range m.Parts {
		for _, ref := range p.Chunks {
			all = append(all, Content{ref.ID, int64(ref.Size)})
		}
	}
	return all
}
