package main

import (
	"archive/tar"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	_ "modernc.org/sqlite" // the driver of a node's database

	"github.com/atoll-run/atoll/carry"
	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/internal/wan"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/pace"
	"github.com/atoll-run/atoll/peer/peertest"
	"github.com/atoll-run/atoll/runtime/fake"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/snapshot"
)

// host is a node's stores and what moves their content.
type host struct {
	*carry.Carrier
	peer      *peertest.Node
	snapshots *snapshot.Store
	images    *image.Store
}

func newHost(t *testing.T, name string) *host {
	t.Helper()
	dir, log := t.TempDir(), slog.New(slog.DiscardHandler)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	h := &host{}
	var err error
	h.images, err = image.Open(filepath.Join(dir, "images"), image.Options{})
	check(err)
	h.snapshots, _, err = snapshot.Open(filepath.Join(dir, "snapshots"))
	check(err)
	stage, err := chunk.OpenDisk(filepath.Join(dir, "stage"), chunk.DiskOptions{})
	check(err)
	t.Cleanup(func() { _ = stage.Close() })
	db, err := sql.Open("sqlite", "file:"+filepath.Join(dir, "node.db"))
	check(err)
	t.Cleanup(func() { _ = db.Close() })
	db.SetMaxOpenConns(1)
	world := fake.NewWorld(t.TempDir(), "") // no sandbox is started
	t.Cleanup(world.Close)
	n, err := node.Open(t.Context(), node.Config{Dir: dir, DB: db, Runtimes: []sandbox.Runtime{world.Open(fake.Config{})}, Images: h.images,
		Snapshots: h.snapshots, NetworkError: errors.New("no network in this test"), Log: log})
	check(err)
	t.Cleanup(func() { _ = n.Shutdown(context.Background()) })
	h.Carrier = carry.New(carry.Config{Snapshots: h.snapshots, Images: h.images, Node: n, Stage: stage, Pacer: pace.New(0, pace.DefaultShares), Log: log})
	h.peer = peertest.Listen(t, name, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.Handler().ServeHTTP(w, r) }), nil)
	h.Use(h.peer.Group)
	return h
}

// across returns an address from which connections go to another one over the link.
func across(t *testing.T, l *wan.Link, to string) string {
	t.Helper()
	port := wan.AddrB.String() + ":9000"
	var far net.Listener
	near, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		err = l.Do(1, func() (err error) {
			far, err = net.Listen("tcp", port)
			return err
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	go forward(near, func() (c net.Conn, err error) {
		err = l.Do(0, func() (err error) {
			c, err = net.Dial("tcp", port)
			return err
		})
		return c, err
	})
	go forward(far, func() (net.Conn, error) { return net.Dial("tcp", to) })
	t.Cleanup(func() { _, _ = near.Close(), far.Close() })
	return near.Addr().String()
}

// forward carries the connections of a listener on, until it is closed.
func forward(ln net.Listener, dial func() (net.Conn, error)) {
	for {
		in, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer in.Close()
			out, err := dial()
			if err != nil {
				return
			}
			defer out.Close()
			go func() {
				_, _ = io.Copy(in, out)
				_ = in.Close()
			}()
			_, _ = io.Copy(out, in)
		}()
	}
}

// work changes a memory as a program does that works: some places anew, and a log that grows.
func work(r *rand.Rand, memory []byte, log *bytes.Buffer) {
	for range 100 {
		at := r.IntN(len(memory) - 64)
		for i := range 60 {
			memory[at+i] = byte(r.IntN(64))
		}
	}
	for range 5000 {
		log.WriteByte(byte('a' + r.IntN(16)))
	}
}

// save commits a snapshot of a memory and a log.
func (h *host) save(t *testing.T, root sandbox.Root, files map[string][]byte) (m snapshot.Manifest) {
	t.Helper()
	spec := sandbox.Spec{ID: "worker", Root: root, Network: sandbox.NetworkNone}
	meta, err := json.Marshal(node.Snapshot{Sandbox: "worker", Source: node.Sandbox{ID: "worker", Spec: spec}})
	if err != nil {
		t.Fatal(err)
	}
	d, err := h.snapshots.Begin()
	for name, data := range files {
		if err == nil {
			err = os.WriteFile(filepath.Join(d.Dir, name), data, 0o600)
		}
	}
	if err == nil {
		m, err = d.Commit(snapshot.Manifest{Sandbox: "worker", Runtime: "gvisor", Spec: spec, Created: time.Now().UTC(), Meta: meta}, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// root imports an image of one small file.
func (h *host) root(t *testing.T) sandbox.Root {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: "data", Mode: 0o644, Size: 5})
	_, _ = io.WriteString(w, "bytes")
	i, importErr := h.images.Import(t.Context(), &b, image.ImportOptions{Name: "base"})
	if err := errors.Join(err, importErr); err != nil {
		t.Fatal(err)
	}
	return i.Root
}

// conformance: W8
func TestTwentySnapshotsCrossALossyLinkInATenthOfTheirBytes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, as network namespaces do")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs /dev/net/tun")
	}
	l, err := wan.Open(wan.Path{Rate: 200e6, Delay: time.Millisecond, Loss: 0.01, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	a, b := newHost(t, "a"), newHost(t, "b")
	peertest.Join(t, a.peer, b.peer, across(t, l, b.peer.Addr))

	r := rand.New(rand.NewPCG(1, 1))
	memory, log, root := make([]byte, 4<<20), &bytes.Buffer{}, a.root(t)
	for at := 0; at < len(memory); at += 16 { // about a third of it is new
		for i := range 6 {
			memory[at+i] = byte(r.IntN(200))
		}
	}
	var naive, sent int64
	for range 20 {
		work(r, memory, log)
		m := a.save(t, root, map[string][]byte{"memory": memory, "log": log.Bytes()})
		res, err := a.Push(t.Context(), carry.Snapshot, m.ID, "b", nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.snapshots.Verify(m.ID); err != nil {
			t.Fatal(err)
		}
		naive, sent = naive+m.Size(), sent+res.Wire
	}
	crossed, lost := l.There.Bytes.Load(), l.There.Lost.Load()
	t.Logf("measured: W8 20 snapshots of %d bytes: %d bytes of chunks, %d with all that crossed the link, %d packets lost: %.1f times fewer", naive, sent, crossed, lost, float64(naive)/float64(crossed))
	if crossed*10 > naive {
		t.Errorf("%d bytes crossed the link for %d", crossed, naive)
	}
	if crossed < sent || crossed > sent*5/4+20*16<<10 {
		t.Errorf("%d bytes crossed the link for %d of chunks", crossed, sent)
	}
	if lost == 0 {
		t.Error("the link lost nothing")
	}
}
