package cache

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/zeebo/xxh3"

	"github.com/atoll-run/atoll/sandbox"
)

// A file of pages is a header that says what they belong to, and for each page its
// key, its bytes and their hash. It is a cache: what does not fit or is damaged is
// left out, and never an error.

func (p *Pool) header() []byte {
	l := p.layout
	return fmt.Appendf(nil, "atoll pages 1 %x %d %d %d %d %d\n", p.root, l.Layers, l.KV.Type, l.KV.Heads, l.KV.HeadDim, l.KV.PageLen)
}

// Write keeps the pages that nobody uses, the latest used first, in a file of at
// most size bytes. Sequences must have been released.
func (p *Pool) Write(name string, size int64) (err error) {
	const op = "cache.Write"
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return sandbox.E(op, sandbox.Denied, name, err)
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".pages-*")
	if err != nil {
		return sandbox.E(op, sandbox.Denied, name, err)
	}
	w := bufio.NewWriterSize(f, 1<<20)
	_, _ = w.Write(p.header()) // Flush tells of errors
	left := size - int64(len(p.header()))
	for e := p.idle.Back(); e != nil && left >= int64(len(Key{}))+p.layout.PageBytes()+8; e = e.Prev() {
		page := e.Value.(Page)
		data := p.page(page)
		_, _ = w.Write(p.keys[page][:])
		_, _ = w.Write(data)
		_, _ = w.Write(binary.LittleEndian.AppendUint64(nil, xxh3.Hash(data)))
		left -= int64(len(Key{})) + int64(len(data)) + 8
	}
	err = errors.Join(w.Flush(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return sandbox.E(op, sandbox.Exhausted, name, err)
	}
	return nil
}

// Read takes in what Write kept, as far as it is of the same model and layout and
// there are free pages. It fails with NotFound when there is no file.
func (p *Pool) Read(name string) error {
	const op = "cache.Read"
	f, err := os.Open(filepath.Clean(name))
	if err != nil {
		return sandbox.E(op, sandbox.NotFound, name, err)
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<20)
	head := make([]byte, len(p.header()))
	if _, err := io.ReadFull(r, head); err != nil || !bytes.Equal(head, p.header()) {
		return nil // of another model, or another kind of cache
	}
	var pages []Page
	for len(p.free) > 0 {
		var key Key
		var sum [8]byte
		page := p.free[len(p.free)-1]
		_, err1 := io.ReadFull(r, key[:])
		_, err2 := io.ReadFull(r, p.page(page))
		_, err3 := io.ReadFull(r, sum[:])
		if errors.Join(err1, err2, err3) != nil || binary.LittleEndian.Uint64(sum[:]) != xxh3.Hash(p.page(page)) {
			break
		}
		if _, twice := p.index[key]; twice || key == (Key{}) {
			continue
		}
		p.free = p.free[:len(p.free)-1]
		p.index[key], p.keys[page] = page, key
		pages = append(pages, page)
	}
	for i := len(pages) - 1; i >= 0; i-- { // the latest used came first
		p.spot[pages[i]] = p.idle.PushBack(pages[i])
	}
	return nil
}
