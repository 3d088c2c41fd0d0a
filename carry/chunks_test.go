package carry_test

import (
	"errors"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/bucket"
	"github.com/atoll-run/atoll/chunk/bucket/buckettest"
	"github.com/atoll-run/atoll/chunk/cache"
	"github.com/atoll-run/atoll/peer/peertest"
	"github.com/atoll-run/atoll/sandbox"
)

// region is hosts at sites that all know each other, and a source far away.
// store is the URL of the object store that they have; empty: none.
func region(t *testing.T, store string, sites ...string) (source *host, nodes []*host) {
	t.Helper()
	at := func(name, site string) *host {
		m, err := cache.NewMemory(64 * mib)
		if err != nil {
			t.Fatal(err)
		}
		o := options{site: site, tiers: []cache.Tier{m}}
		if store != "" {
			if o.store, err = bucket.Open(ctx, store, bucket.Options{}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = o.store.Close() })
		}
		return newHostWith(t, name, o)
	}
	source = at("source", "us/one")
	for i, site := range sites {
		n := at("node"+string(rune('0'+i)), site)
		for _, other := range append([]*host{source}, nodes...) {
			peertest.Join(t, n.Node, other.Node, other.Addr)
		}
		nodes = append(nodes, n)
	}
	return source, nodes
}

// folder is the URL of an object store in a directory.
func folder(t *testing.T) string { return "file://" + filepath.ToSlash(t.TempDir()) }

// from returns how many bytes a host has fetched from a distance.
func (h *host) from(distance string) int64 {
	for _, s := range h.Fetched() {
		if s.From == distance {
			return s.Bytes
		}
	}
	return 0
}

// conformance: W3 V5
func TestNodesOfARegionThatPullTheSameFetchItOnceFromAfar(t *testing.T) {
	source, nodes := region(t, "", "eu/one", "eu/one", "eu/two", "eu/two")
	const size = 24 * mib
	i := source.addImage(t, "app:1", content(1, size))
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			if _, err := n.Pull(ctx, carry.Image, "app:1", "source", nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var far, regional, local int64
	for _, n := range nodes {
		if got, err := n.images.Get("app:1"); err != nil || got.ID != i.ID || !n.images.Holds(i.Root.Digest) {
			t.Errorf("%+v, %v", got, err)
		}
		far, regional, local = far+n.from("global"), regional+n.from("regional"), local+n.from("local")
		if n.from("global") == 0 {
			t.Errorf("%s fetches nothing from afar", n.ID())
		}
	}
	sent := 0
	for _, a := range source.asked() {
		if len(a) == 64 {
			sent++
		}
	}
	t.Logf("measured: W3 4 nodes at 2 places of a region pull %d bytes: %d from afar, %d within the region, %d within places; %d chunks leave the source", size, far, regional, local, sent)
	if chunks := size/mib + 1; sent != chunks {
		t.Errorf("%d chunks leave the source, want %d", sent, chunks)
	}
	if regional > 2*far {
		t.Errorf("%d bytes between places, %d from afar", regional, far)
	}
}

// conformance: W3
func TestWhoHoldsTheWholeNearbyGivesIt(t *testing.T) {
	source, nodes := region(t, "", "eu/one", "eu/two", "eu/one")
	i := source.addImage(t, "app:1", content(1, 4*mib))
	if _, err := source.Push(ctx, carry.Image, "app:1", nodes[1].ID(), nil); err != nil {
		t.Fatal(err)
	}
	source.asked()
	if _, err := nodes[0].Pull(ctx, carry.Image, "app:1", "source", nil); err != nil {
		t.Fatal(err)
	}
	if nodes[0].from("global") != 0 || nodes[0].from("regional")+nodes[0].from("local") == 0 || !nodes[0].images.Holds(i.Root.Digest) {
		t.Errorf("fetched %+v", nodes[0].Fetched())
	}
}

func TestANodeOfTheRegionThatIsDeadIsLeftOut(t *testing.T) {
	source, nodes := region(t, "", "eu/one", "eu/one")
	_ = nodes[1].Others.Close()
	_ = nodes[1].Group.Close()
	i := source.addImage(t, "app:1", content(1, 6*mib))
	if _, err := nodes[0].Pull(ctx, carry.Image, "app:1", "source", nil); err != nil {
		t.Fatal(err)
	}
	if !nodes[0].images.Holds(i.Root.Digest) {
		t.Error("it is not there")
	}
}

func TestWithAnOlderVersionOnlyTheDifferenceIsPulled(t *testing.T) {
	source, nodes := region(t, "", "eu/one", "eu/one")
	data := content(1, 6*mib)
	source.addImage(t, "app:1", data)
	if _, err := nodes[0].Pull(ctx, carry.Image, "app:1", "source", nil); err != nil {
		t.Fatal(err)
	}
	copy(data[mib:], content(2, 5000))
	source.addImage(t, "app:2", data)
	res, err := nodes[0].Pull(ctx, carry.Image, "app:2", "source", nil)
	if err != nil || res.Wire > 40_000 {
		t.Errorf("%+v, %v", res, err)
	}
}

// conformance: W3 W4
func TestAnObjectStoreIsPushedToAndPulledFromOnceForTheRegion(t *testing.T) {
	pushedToAndPulledFrom(t, folder(t))
}

// conformance: W3
func TestAzureIsPushedToAndPulledFromOnceForTheRegion(t *testing.T) {
	pushedToAndPulledFrom(t, buckettest.Azure(t)())
}

func pushedToAndPulledFrom(t *testing.T, store string) {
	t.Helper()
	source, nodes := region(t, store, "eu/one", "eu/one")
	root := source.addImage(t, "base:1", content(1, 3*mib)).Root
	memory := content(2, 9*mib)
	m := source.save(t, root, "", map[string][]byte{"pages.img": memory, "empty": nil})
	res, err := source.Push(ctx, carry.Snapshot, m.ID, carry.StoreName, nil)
	if err != nil || res.Wire == 0 {
		t.Fatalf("%+v, %v", res, err)
	}
	copy(memory[4*mib+1000:], content(3, 5000))
	next := source.save(t, root, m.ID, map[string][]byte{"pages.img": memory, "empty": nil})
	if res, err = source.Push(ctx, carry.Snapshot, next.ID, carry.StoreName, nil); err != nil || res.Wire > 3*mib {
		t.Errorf("of one changed chunk %+v is written, %v", res, err)
	}
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			if _, err := n.Pull(ctx, carry.Snapshot, m.ID, carry.StoreName, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, n := range nodes {
		same(t, source, n, m.ID)
	}
	if got := nodes[0].from("store") + nodes[1].from("store"); got > res.Size+mib {
		t.Errorf("%d bytes come from the store, of %d", got, res.Size)
	}
	before := nodes[0].from("store")
	if _, err := nodes[0].Pull(ctx, carry.Snapshot, next.ID, carry.StoreName, nil); err != nil {
		t.Fatal(err)
	}
	same(t, source, nodes[0], next.ID)
	if got := nodes[0].from("store") - before; got > 2*mib {
		t.Errorf("%d bytes of a snapshot of which the rest was fetched", got)
	}
	if _, err := source.Push(ctx, carry.Image, "base:1", carry.StoreName, nil); err != nil {
		t.Fatal(err)
	}
	if res, err := nodes[1].Pull(ctx, carry.Image, "base:1", carry.StoreName, nil); err != nil || res.Held == 0 {
		t.Errorf("%+v, %v", res, err)
	}
	if got, err := nodes[1].images.Get("base:1"); err != nil || got.Root.Digest != root.Digest {
		t.Errorf("%+v, %v", got, err)
	}
	_, err = nodes[0].Pull(ctx, carry.Image, "base:2", carry.StoreName, nil)
	wantKind(t, err, sandbox.NotFound)
	if err := nodes[0].SweepStore(ctx, next.Created); err != nil {
		t.Error(err)
	}
}

// conformance: FR5.4
func TestWhatTheObjectStoreHasIsListedRemovedAndExpires(t *testing.T) {
	store, err := bucket.Open(ctx, "file://"+t.TempDir(), bucket.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	h := newHostWith(t, "a", options{store: store, rules: chunk.Rules{KeepLast: 1, MaxAge: time.Hour}})
	push := func(kind carry.Kind, ref string) {
		t.Helper()
		if _, err := h.Push(ctx, kind, ref, carry.StoreName, nil); err != nil {
			t.Fatal(err)
		}
	}
	listed := func() (all []string) {
		t.Helper()
		list, err := h.Stored(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range list {
			if s.Error != "" || s.Size == 0 {
				t.Errorf("%+v", s)
			}
			all = append(all, s.ID)
		}
		slices.Sort(all)
		return all
	}
	one := h.addImage(t, "app:1", content(1, mib))
	push(carry.Image, "app:1")
	two := h.addImage(t, "app:1", content(2, mib)) // takes the name
	push(carry.Image, "app:1")
	m := h.save(t, two.Root, "", map[string][]byte{"pages.img": content(3, mib)})
	push(carry.Snapshot, m.ID)
	want := []string{one.ID, two.ID, m.ID}
	slices.Sort(want)
	if got := listed(); !slices.Equal(got, want) {
		t.Fatalf("%v, want %v", got, want)
	}

	// The older image has no name any more, and is the only one that may go.
	if err := h.SweepStore(ctx, time.Now().Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	want = []string{two.ID, m.ID}
	slices.Sort(want)
	if got := listed(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	wantKind(t, h.Unstore(ctx, "nothing"), sandbox.NotFound)
	wantKind(t, h.Unstore(ctx, one.ID), sandbox.NotFound)
	if err := errors.Join(h.Unstore(ctx, "app:1"), h.Unstore(ctx, m.ID[:8])); err != nil {
		t.Fatal(err)
	}
	if got := listed(); len(got) != 0 {
		t.Errorf("%v are left", got)
	}
	_, err = h.Pull(ctx, carry.Image, "app:1", carry.StoreName, nil)
	wantKind(t, err, sandbox.NotFound)
	if err := h.SweepStore(ctx, time.Now().Add(1000*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := store.Each(ctx, func(e chunk.Entry) error { return errors.New(e.ID.String() + " is left") }); err != nil {
		t.Error(err)
	}
}

func TestADamagedObjectStoreIsFoundOut(t *testing.T) {
	_, nodes := region(t, folder(t), "eu/one", "eu/one")
	_, err := newHost(t, "bare", 0).Pull(ctx, carry.Snapshot, "x", carry.StoreName, nil)
	wantKind(t, err, sandbox.Unsupported)
	for _, path := range []string{"/fetch/v1/chunks/zz", "/fetch/v1/chunks/" + string(slices.Repeat([]byte("0"), 64)) + "?file=&at=0&size=1&stage=0"} {
		p, err := nodes[0].Find(nodes[1].ID())
		if err != nil {
			t.Fatal(err)
		}
		l, err := nodes[0].Link(ctx, p)
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.Do(ctx, http.MethodGet, path, nil)
		wantKind(t, err, sandbox.Invalid)
	}
}
