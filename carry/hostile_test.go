package carry

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// honest is an offer of a snapshot of one file.
func honest(t testing.TB) offer {
	t.Helper()
	root, state := chunk.Sum([]byte("root")), chunk.Sum([]byte("state"))
	meta, err := json.Marshal(snapshot.Manifest{Format: 1, ID: "abc", Sandbox: "box", Runtime: "gvisor",
		Spec:  sandbox.Spec{ID: "box", Root: sandbox.Root{Kind: sandbox.RootEROFS, Digest: named(root)}},
		Files: []snapshot.File{{Name: "pages.img", Size: 5, Digest: named(state)}}})
	if err != nil {
		t.Fatal(err)
	}
	return offer{Kind: Snapshot, ID: "abc", Meta: meta, Files: []offered{
		{Name: rootName, Size: 4, Digest: root}, {Name: statePrefix + "pages.img", Size: 5, Digest: state, Bases: []chunk.ID{{1}}}}}
}

func TestOffersThatMakeNoSenseAreRefused(t *testing.T) {
	o := honest(t)
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	if _, err := o.snapshot(); err != nil {
		t.Fatal(err)
	}
	rename := func(o *offer, name string) {
		o.Files[1].Name = statePrefix + name
		o.Meta = []byte(strings.Replace(string(o.Meta), `"pages.img"`, `"`+name+`"`, 1))
	}
	for name, edit := range map[string]func(*offer){
		"kind":            func(o *offer) { o.Kind = "model" },
		"upward":          func(o *offer) { rename(o, "../../x") },
		"absolute":        func(o *offer) { rename(o, "/etc/passwd") },
		"another file":    func(o *offer) { o.Files[1].Name = statePrefix + "other" },
		"another size":    func(o *offer) { o.Files[1].Size++ },
		"another digest":  func(o *offer) { o.Files[1].Digest[0]++ },
		"another root":    func(o *offer) { o.Files[0].Digest[0]++ },
		"no root":         func(o *offer) { o.Files = o.Files[1:] },
		"a file too many": func(o *offer) { o.Files = append(o.Files, offered{Name: "state/x"}) },
		"twice":           func(o *offer) { o.Files = append(o.Files, o.Files[1]) },
		"no name":         func(o *offer) { o.Files[1].Name = statePrefix },
		"foreign name":    func(o *offer) { o.Files[1].Name = "etc/passwd" },
		"another ID":      func(o *offer) { o.ID = "abd" },
		"bad ID":          func(o *offer) { o.ID, o.Meta = "../x", []byte(strings.Replace(string(o.Meta), `"abc"`, `"../x"`, 1)) },
		"negative":        func(o *offer) { o.Files[1].Size = -1 },
		"huge":            func(o *offer) { o.Files[1].Size = maxFile + 1 },
		"many bases":      func(o *offer) { o.Files[1].Bases = make([]chunk.ID, maxBases+1) },
		"host's root":     func(o *offer) { o.Meta = []byte(strings.Replace(string(o.Meta), `"erofs"`, `"host"`, 1)) },
		"no manifest":     func(o *offer) { o.Meta = []byte(`{}`) },
	} {
		o := honest(t)
		edit(&o)
		err := o.check()
		if err == nil {
			_, err = o.snapshot()
		}
		if err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
}

func FuzzOffer(f *testing.F) {
	good, err := json.Marshal(honest(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"kind":"image","id":"x","meta":{},"files":[{"name":"root"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var o offer
		if json.Unmarshal(data, &o) != nil || o.check() != nil {
			return
		}
		if o.Kind == Image {
			_, _ = o.image()
			return
		}
		m, err := o.snapshot()
		if err != nil {
			return
		}
		if !sandbox.ValidID(m.ID) || m.Spec.Root.Kind != sandbox.RootEROFS || len(m.Files)+1 != len(o.Files) {
			t.Fatalf("%+v is taken", o)
		}
		for _, file := range o.Files[1:] {
			if !filepath.IsLocal(filepath.FromSlash(file.Name[len(statePrefix):])) {
				t.Fatalf("%q leaves its folder", file.Name)
			}
		}
	})
}
