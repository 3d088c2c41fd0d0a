package microvm

import "testing"

// conformance: V3
func TestWhatHasChangedLittleIsSentBesideWhatItWasMadeOf(t *testing.T) {
	clone := origin{Base: make([]pageFile, 1), Layers: make([]string, 2)}
	for _, c := range []struct {
		name     string
		o        origin
		own, top int64 // bytes
		want     bool
	}{
		{"idle", clone, 10 << 20, 200 << 10, true},
		{"has worked", clone, 24 << 20, 2 << 20, true},
		{"much memory", clone, 64 << 20, 0, false},
		{"much on the disk", clone, 1 << 20, 16 << 20, false},
		{"booted, of no template", origin{Layers: make([]string, 2)}, 1 << 20, 0, false},
		{"nothing under its disk's layer", origin{Base: make([]pageFile, 1), Layers: make([]string, 1)}, 1 << 20, 0, false},
		{"more page files than are kept apart", origin{Base: make([]pageFile, maxBase+1), Layers: make([]string, 2)}, 1 << 20, 0, false},
	} {
		if got := lean(c.o, c.own, c.top); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
