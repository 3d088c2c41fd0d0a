// Package chunktest is the suite that every chunk.Store passes.
package chunktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/sandbox"
)

// Subject is a store to be tested. All its functions are about the same chunks and refs.
type Subject struct {
	// Open opens the store; again: after it was closed, as another process would.
	Open func(t *testing.T) chunk.Store
	// Damage changes a bit of what is kept of a chunk.
	Damage func(t *testing.T, id chunk.ID)
	// Later returns a time at which chunks written now are older than the store's Grace.
	Later func() time.Time
}

// Run tests a store; make returns a fresh, empty one.
func Run(t *testing.T, make func(t *testing.T) Subject) {
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s Subject)
	}{
		{"AChunkComesBackAndHasItsName", comesBack},
		{"SizesAndNamesAreChecked", checks},
		{"OneThatIsThereCanBePutAgain", putAgain},
		{"DamageIsNeverReturned", damage},
		{"RefsAreNamedReplacedAndRemoved", refs},
		{"EverythingSurvivesReopening", survives},
		{"APartComesBackByItsManifest", part},
		{"CollectionKeepsWhatIsReachableOrLeased", collection},
		{"CollectionBesideWritersLosesNothing", besideWriters},
		{"AnEndedContextEndsTheCall", ended},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, make(t)) })
	}
}

var ctx = context.Background()

func content(seed, size int) []byte {
	r := rand.New(rand.NewPCG(uint64(seed), 7))
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(r.IntN(32))
	}
	return b
}

func put(t *testing.T, s chunk.Store, data []byte) chunk.ID {
	t.Helper()
	id, err := s.Put(ctx, data)
	if err != nil || id != chunk.Sum(data) {
		t.Fatalf("Put: %s, %v", id, err)
	}
	return id
}

func wantKind(t *testing.T, err error, kind sandbox.Kind) {
	t.Helper()
	if !sandbox.Is(err, kind) {
		t.Errorf("%v, want %s", err, kind)
	}
}

// list returns the chunks that the store has.
func list(t *testing.T, s chunk.Store) map[chunk.ID]chunk.Entry {
	t.Helper()
	all := make(map[chunk.ID]chunk.Entry)
	if err := s.Each(ctx, func(e chunk.Entry) error { all[e.ID] = e; return nil }); err != nil {
		t.Fatal(err)
	}
	return all
}

func comesBack(t *testing.T, sub Subject) {
	s := sub.Open(t)
	want := map[chunk.ID]bool{}
	for i, size := range []int{1, 100, 4096, 1 << 20, chunk.MaxSize} {
		data := content(i, size)
		id := put(t, s, data)
		want[id] = true
		if got, err := s.Get(ctx, id); err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d bytes: %v", size, err)
		}
	}
	zero := put(t, s, make([]byte, 8192))
	want[zero] = true
	if got, err := s.Get(ctx, zero); err != nil || !bytes.Equal(got, make([]byte, 8192)) {
		t.Fatal(err)
	}
	all := list(t, s)
	for id, e := range all {
		if !want[id] || e.Size < 1 || time.Since(e.Written) > time.Hour {
			t.Errorf("Each gives %+v", e)
		}
	}
	if len(all) != len(want) {
		t.Errorf("Each gives %d of %d chunks", len(all), len(want))
	}
	boom := errors.New("boom")
	if err := s.Each(ctx, func(chunk.Entry) error { return boom }); !errors.Is(err, boom) {
		t.Errorf("Each returns %v", err)
	}
}

func checks(t *testing.T, sub Subject) {
	s := sub.Open(t)
	for _, bad := range [][]byte{nil, make([]byte, chunk.MaxSize+1)} {
		_, err := s.Put(ctx, bad)
		wantKind(t, err, sandbox.Invalid)
	}
	for _, bad := range []string{"", "/a", "a/", "a//b", "../a", "a/../b", ".hidden", "a b", "ä", "a\x00", string(content(1, 300))} {
		wantKind(t, s.SetRef(ctx, bad, chunk.ID{1}), sandbox.Invalid)
		wantKind(t, s.DeleteRef(ctx, bad), sandbox.Invalid)
	}
	_, err := s.Get(ctx, chunk.ID{1})
	wantKind(t, err, sandbox.NotFound)
	if err := s.Delete(ctx, chunk.ID{1}); err != nil {
		t.Errorf("deleting what is not there: %v", err)
	}
	if len(list(t, s)) > 0 {
		t.Error("failed calls left something")
	}
}

func putAgain(t *testing.T, sub Subject) {
	s := sub.Open(t)
	data := content(1, 5000)
	var wg sync.WaitGroup
	for range 8 { // also at once
		wg.Go(func() {
			if _, err := s.Put(ctx, data); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	a, absent, b := put(t, s, data), chunk.ID{9}, put(t, s, content(2, 10))
	if all := list(t, s); len(all) != 2 {
		t.Errorf("%d chunks", len(all))
	}
	if missing, err := s.Missing(ctx, []chunk.ID{a, absent, b, absent}); err != nil || !slices.Equal(missing, []chunk.ID{absent, absent}) {
		t.Errorf("Missing: %v, %v", missing, err)
	}
	if err := s.Delete(ctx, a); err != nil {
		t.Fatal(err)
	}
	if missing, err := s.Missing(ctx, []chunk.ID{a, b}); err != nil || !slices.Equal(missing, []chunk.ID{a}) {
		t.Errorf("Missing after Delete: %v, %v", missing, err)
	}
	put(t, s, data)
}

func damage(t *testing.T, sub Subject) {
	s := sub.Open(t)
	data := content(1, 10_000)
	id := put(t, s, data)
	sub.Damage(t, id)
	got, err := s.Get(ctx, id)
	wantKind(t, err, sandbox.Invalid)
	if got != nil {
		t.Error("damaged content is returned")
	}
	if missing, err := s.Missing(ctx, []chunk.ID{id}); err != nil || len(missing) != 1 {
		t.Errorf("a chunk that was found damaged is not missing: %v, %v", missing, err)
	}
	put(t, s, data)
	if got, err := s.Get(ctx, id); err != nil || !bytes.Equal(got, data) {
		t.Errorf("it cannot be put again: %v", err)
	}
}

func refs(t *testing.T, sub Subject) {
	s := sub.Open(t)
	want := map[string]chunk.ID{"one": {1}, "snapshots/a-b_c.d": {2}, "Z9": {3}}
	for name, id := range want {
		if err := s.SetRef(ctx, name, id); err != nil {
			t.Fatal(err)
		}
	}
	want["one"] = chunk.ID{4}
	if err := s.SetRef(ctx, "one", chunk.ID{4}); err != nil {
		t.Fatal(err)
	}
	delete(want, "Z9")
	for range 2 {
		if err := s.DeleteRef(ctx, "Z9"); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.Refs(ctx); err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}

func survives(t *testing.T, sub Subject) {
	s := sub.Open(t)
	data := content(3, 70_000)
	id := put(t, s, data)
	if err := s.SetRef(ctx, "kept", id); err != nil {
		t.Fatal(err)
	}
	s = sub.Open(t)
	if got, err := s.Get(ctx, id); err != nil || !bytes.Equal(got, data) {
		t.Error(err)
	}
	if got, err := s.Ref(ctx, "kept"); err != nil || got != id {
		t.Errorf("the ref leads to %v, %v", got, err)
	}
	_, err := s.Ref(ctx, "missing")
	wantKind(t, err, sandbox.NotFound)
	_, err = s.Ref(ctx, "../kept")
	wantKind(t, err, sandbox.Invalid)
	if got, err := s.Refs(ctx); err != nil || got["kept"] != id || len(got) != 1 {
		t.Errorf("%v, %v", got, err)
	}
}

// save puts a manifest of one part under a ref.
func save(t *testing.T, v *chunk.Vault, ref string, data []byte, parent chunk.ID) chunk.ID {
	t.Helper()
	l := v.Lease()
	defer l.Release()
	p, err := chunk.WritePart(ctx, l, "content", bytes.NewReader(data))
	if err != nil {
		t.Error(err)
		return chunk.ID{}
	}
	id, err := chunk.PutManifest(ctx, l, chunk.Manifest{Kind: "test", Parent: parent, Created: time.Unix(1, 0), Parts: []chunk.Part{p}})
	if err == nil {
		err = v.SetRef(ctx, ref, id)
	}
	if err != nil {
		t.Error(err)
	}
	return id
}

// load compares what a manifest leads to.
func load(t *testing.T, s chunk.Store, id chunk.ID, want []byte) {
	t.Helper()
	m, err := chunk.GetManifest(ctx, s, id)
	if err != nil {
		t.Error(err)
		return
	}
	var got bytes.Buffer
	if _, err := got.ReadFrom(chunk.NewReader(ctx, s, m.Parts[0])); err != nil || !bytes.Equal(got.Bytes(), want) {
		t.Errorf("the part is another: %v", err)
	}
}

func part(t *testing.T, sub Subject) {
	v := chunk.NewVault(sub.Open(t))
	first, second := content(1, 2*chunk.CutSize+17), content(2, chunk.CutSize)
	a := save(t, v, "line", first, chunk.ID{})
	b := save(t, v, "line", second, a)
	load(t, v, a, first)
	load(t, v, b, second)
	if chain, err := chunk.Lineage(ctx, v, b); err != nil || len(chain) != 2 || chain[0].Parent != a {
		t.Errorf("the lineage is %v, %v", chain, err)
	}
	m, err := chunk.GetManifest(ctx, v, a)
	if err != nil {
		t.Fatal(err)
	}
	p := m.Parts[0]
	p.Chunks = slices.Clone(p.Chunks)
	p.Chunks[0], p.Chunks[1] = p.Chunks[1], p.Chunks[0]
	_, err = new(bytes.Buffer).ReadFrom(chunk.NewReader(ctx, v, p))
	wantKind(t, err, sandbox.Invalid)
	if err := v.Delete(ctx, p.Chunks[1].ID); err != nil {
		t.Fatal(err)
	}
	_, err = new(bytes.Buffer).ReadFrom(chunk.NewReader(ctx, v, p))
	wantKind(t, err, sandbox.NotFound)
}

func collection(t *testing.T, sub Subject) {
	v := chunk.NewVault(sub.Open(t))
	kept, gone := content(1, chunk.CutSize+5), content(2, chunk.CutSize+9)
	a := save(t, v, "kept", kept, chunk.ID{})
	b := save(t, v, "gone", gone, a)
	leased := v.Lease()
	held, err := leased.Put(ctx, content(3, 100))
	if err != nil {
		t.Fatal(err)
	}
	if err := v.DeleteRef(ctx, "gone"); err != nil {
		t.Fatal(err)
	}
	if v.Grace() > 0 {
		if done, err := v.Collect(ctx, time.Now()); err != nil || done.Removed > 0 {
			t.Errorf("young chunks of unknown writers are removed: %+v, %v", done, err)
		}
	}
	done, err := v.Collect(ctx, sub.Later())
	if err != nil || done.Removed != 3 || done.Kept != 4 || done.Bytes < 1 {
		t.Errorf("collected %+v, %v", done, err)
	}
	load(t, v, a, kept)
	_, err = v.Get(ctx, b)
	wantKind(t, err, sandbox.NotFound)
	leased.Release()
	leased.Release()
	if done, err := v.Collect(ctx, sub.Later()); err != nil || done.Removed != 1 {
		t.Errorf("collected %+v, %v", done, err)
	}
	_, err = v.Get(ctx, held)
	wantKind(t, err, sandbox.NotFound)
	// A ref whose manifest cannot be read may lead anywhere.
	if err := v.SetRef(ctx, "broken", chunk.ID{7}); err != nil {
		t.Fatal(err)
	}
	if err := v.DeleteRef(ctx, "kept"); err != nil {
		t.Fatal(err)
	}
	if done, err := v.Collect(ctx, sub.Later()); err == nil || done.Removed > 0 {
		t.Errorf("collected %+v although a manifest is missing", done)
	}
}

// besideWriters saves the same few contents again and again, under refs that come and go, while it collects.
func besideWriters(t *testing.T, sub Subject) {
	v := chunk.NewVault(sub.Open(t))
	const writers, rounds, contents = 4, 12, 3
	stop := make(chan struct{})
	var collecting, writing sync.WaitGroup
	collecting.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := v.Collect(ctx, sub.Later()); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for w := range writers {
		writing.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			ref := fmt.Sprintf("writer-%d", w)
			for range rounds {
				data := content(r.IntN(contents), 2000)
				load(t, v, save(t, v, ref, data, chunk.ID{}), data)
				if r.IntN(2) == 0 {
					if err := v.DeleteRef(ctx, ref); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	writing.Wait()
	close(stop)
	collecting.Wait()
	refs, err := v.Refs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range refs {
		m, err := chunk.GetManifest(ctx, v, id)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := new(bytes.Buffer).ReadFrom(chunk.NewReader(ctx, v, m.Parts[0])); err != nil {
			t.Error(err)
		}
	}
}

func ended(t *testing.T, sub Subject) {
	s := sub.Open(t)
	id := put(t, s, content(1, 100))
	over, cancel := context.WithCancel(ctx)
	cancel()
	_, err := s.Put(over, content(2, 100))
	wantKind(t, err, sandbox.Canceled)
	_, err = s.Get(over, id)
	wantKind(t, err, sandbox.Canceled)
	_, err = s.Missing(over, []chunk.ID{id})
	wantKind(t, err, sandbox.Canceled)
	if len(list(t, s)) != 1 {
		t.Error("a put that was cancelled is there")
	}
}
