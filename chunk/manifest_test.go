package chunk

import (
	"bytes"
	"context"
	"math"
	"reflect"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

func sample() Manifest {
	return Manifest{
		Kind: "snapshot", Parent: ID{5}, Created: time.Unix(1_700_000_000, 0).UTC(), Meta: []byte(`{"a":1}`),
		Parts: []Part{
			{Name: "empty", Digest: Sum(nil), Chunks: []Ref{}},
			{Name: "state/pages.img", Size: 1<<20 + 7, Digest: ID{8}, Chunks: []Ref{{ID{1}, 1 << 20}, {ID{2}, 7}}},
		},
	}
}

func TestAManifestIsItsEncoding(t *testing.T) {
	m := sample()
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b)
	if err != nil || !reflect.DeepEqual(got, m) {
		t.Errorf("%+v, %v", got, err)
	}
	for i := range b {
		if _, err := Decode(b[:i]); !sandbox.Is(err, sandbox.Invalid) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
	if _, err := Decode(append(b, 0)); !sandbox.Is(err, sandbox.Invalid) {
		t.Errorf("something follows: %v", err)
	}
}

func TestManifestsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, edit := range map[string]func(*Manifest){
		"no kind":       func(m *Manifest) { m.Kind = "" },
		"kind":          func(m *Manifest) { m.Kind = "a b" },
		"before 1970":   func(m *Manifest) { m.Created = time.Unix(-5, 0) },
		"meta":          func(m *Manifest) { m.Meta = make([]byte, maxMeta+1) },
		"absolute":      func(m *Manifest) { m.Parts[0].Name = "/etc/passwd" },
		"upward":        func(m *Manifest) { m.Parts[0].Name = "../x" },
		"hidden upward": func(m *Manifest) { m.Parts[0].Name = "a/../../x" },
		"unclean":       func(m *Manifest) { m.Parts[0].Name = "a//b" },
		"dot":           func(m *Manifest) { m.Parts[0].Name = "." },
		"nul":           func(m *Manifest) { m.Parts[0].Name = "a\x00b" },
		"backslash":     func(m *Manifest) { m.Parts[0].Name = `a\b` },
		"twice":         func(m *Manifest) { m.Parts[0].Name = m.Parts[1].Name },
		"unsorted":      func(m *Manifest) { m.Parts[0].Name = "z" },
		"size":          func(m *Manifest) { m.Parts[1].Size++ },
		"negative":      func(m *Manifest) { m.Parts[1].Chunks[0].Size = -1 },
		"chunk":         func(m *Manifest) { m.Parts[1].Chunks[0].Size, m.Parts[1].Size = MaxSize+1, MaxSize+8 },
	} {
		m := sample()
		m.Parts = slices.Clone(m.Parts)
		m.Parts[1].Chunks = slices.Clone(m.Parts[1].Chunks)
		edit(&m)
		if _, err := m.Encode(); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAManifestThatClaimsMuchAllocatesLittle(t *testing.T) {
	m := sample()
	b, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for i := range b {
		hostile := append(slices.Clone(b[:i]), 0xff, 0xff, 0x03)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _ = Decode(hostile)
		runtime.ReadMemStats(&after)
		if got := after.TotalAlloc - before.TotalAlloc; got > 1<<20 {
			t.Fatalf("%d bytes claim so much that %d are allocated", len(hostile), got)
		}
	}
}

func TestRefNamesAndIDsAreChecked(t *testing.T) {
	for _, good := range []string{"a", "snapshots/x.y-z_1", "A/B/C"} {
		if err := CheckRefName(good); err != nil {
			t.Error(err)
		}
	}
	id := Sum([]byte("x"))
	if got, err := ParseID(id.String()); err != nil || got != id {
		t.Errorf("%s, %v", got, err)
	}
	for _, bad := range []string{"", "ab", id.String() + "00", id.String()[:62] + "zz", "AF" + id.String()[2:]} {
		if _, err := ParseID(bad); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// conformance: FR5.4
func TestExpiredKeepsTheNewestThePinnedAndWhatIsWithinTheLimits(t *testing.T) {
	at := func(hour int, line string, chunks ...byte) Kept {
		m := Manifest{Kind: "test", Created: time.Unix(int64(hour)*3600, 0)}
		for _, c := range chunks {
			m.Parts = append(m.Parts, Part{Chunks: []Ref{{ID{c}, 100}}})
		}
		return Kept{Name: line + "-" + string(rune('a'+hour)), Line: line, Created: m.Created, Holds: m.Content()}
	}
	now := time.Unix(10*3600, 0)
	all := []Kept{at(1, "x", 1, 2), at(2, "x", 2, 3), at(3, "x", 2, 4), at(1, "y", 5), at(9, "y", 1)}
	pinned := slices.Clone(all)
	pinned[0].Pinned = true
	for name, c := range map[string]struct {
		all  []Kept
		r    Rules
		want []string
	}{
		"no rules":           {all, Rules{}, nil},
		"age":                {all, Rules{MaxAge: 8 * time.Hour}, []string{"x-b", "y-b"}},
		"the last stay":      {all, Rules{MaxAge: time.Minute, KeepLast: 1}, []string{"x-b", "y-b", "x-c"}},
		"pinned stay":        {pinned, Rules{MaxAge: time.Minute, KeepLast: 1}, []string{"y-b", "x-c"}},
		"bytes, shared once": {all, Rules{MaxBytes: 400}, []string{"x-b", "y-b"}},
		"everything":         {all, Rules{MaxBytes: 1}, []string{"x-b", "y-b", "x-c", "x-d", "y-j"}},
		"clock went back":    {[]Kept{at(20, "x", 1)}, Rules{MaxAge: time.Hour}, nil},
	} {
		var got []string
		for _, i := range Expired(c.all, c.r, now) {
			got = append(got, c.all[i].Name)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestALoopInALineageEnds(t *testing.T) {
	// No store of ours can hold one, so the loop is in a store that lies.
	a, b := ID{1}, ID{2}
	s := loop{parents: map[ID]ID{a: b, b: a}}
	if chain, err := Lineage(t.Context(), s, a); err != nil || len(chain) != 2 {
		t.Errorf("%d manifests", len(chain))
	}
}

func FuzzDecode(f *testing.F) {
	b, err := sample().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	empty, err := Manifest{Kind: "image", Created: time.Unix(0, 0)}.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(empty)
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Decode(b)
		if err != nil {
			return
		}
		again, err := m.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("another encoding of the same manifest: %v", err)
		}
		if m.Size() < 0 || m.Size() > math.MaxInt64/2 {
			t.Fatal("an impossible size")
		}
	})
}

// loop is a store in which manifests are each other's parents.
type loop struct {
	Store
	parents map[ID]ID
}

func (l loop) Get(_ context.Context, id ID) ([]byte, error) {
	return Manifest{Kind: "test", Parent: l.parents[id], Created: time.Unix(0, 0)}.Encode()
}
