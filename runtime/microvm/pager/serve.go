package pager

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/atoll-run/atoll/prefetch"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// The nodes of the file system: its root and the one file in it.
const (
	rootNode = 1
	fileNode = 2
)

// forEver is how long the kernel may remember what never changes.
const forEver = 1000 * time.Hour

// files is the file system: one file, which is the memory. The kernel keeps what
// it has read, for all who map the file, so that each page is asked for once,
// unless the host is short of memory and the kernel drops it.
type files struct {
	fuse.RawFileSystem
	memory *memory
	fail   func(error) // called once the memory cannot be read; does not return

	mu      sync.Mutex
	touched map[uint32]bool
	order   []uint32 // touched pages that are not all zeros, in the order in which they were asked for
	closed  bool     // no more is recorded
}

func newFiles(m *memory, fail func(error)) *files {
	return &files{RawFileSystem: fuse.NewDefaultRawFileSystem(), memory: m, fail: fail, touched: make(map[uint32]bool)}
}

// String implements fuse.RawFileSystem.
func (f *files) String() string { return vmm.MemoryName }

func (f *files) attr(node uint64, out *fuse.Attr) {
	*out = fuse.Attr{Ino: node, Mode: syscall.S_IFDIR | 0o755, Nlink: 1, Blksize: vmm.PageSize}
	if node == fileNode {
		out.Mode, out.Size = syscall.S_IFREG|0o666, uint64(f.memory.pages)*vmm.PageSize
	}
}

// Lookup implements fuse.RawFileSystem.
func (f *files) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if in.NodeId != rootNode || name != vmm.MemoryName {
		return fuse.ENOENT
	}
	out.NodeId = fileNode
	out.SetEntryTimeout(forEver)
	out.SetAttrTimeout(forEver)
	f.attr(fileNode, &out.Attr)
	return fuse.OK
}

// GetAttr implements fuse.RawFileSystem.
func (f *files) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	out.SetTimeout(forEver)
	f.attr(in.NodeId, &out.Attr)
	return fuse.OK
}

// Open implements fuse.RawFileSystem. The file may be opened for writing, as
// private mappings that are written to want it; but there is no Write.
func (f *files) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId != fileNode {
		return fuse.EISDIR
	}
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// Read implements fuse.RawFileSystem. The kernel asks for what is touched, page by
// page, since it was told not to read ahead.
func (f *files) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	size := uint64(f.memory.pages) * vmm.PageSize
	if in.Offset >= size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	buf = buf[:min(uint64(len(buf)), uint64(in.Size), size-in.Offset)]
	if in.Offset%vmm.PageSize != 0 || len(buf)%vmm.PageSize != 0 {
		return nil, fuse.EINVAL // the page cache knows whole pages only
	}
	first := uint32(in.Offset / vmm.PageSize)
	f.record(first, uint32(len(buf)/vmm.PageSize))
	if err := f.memory.read(buf, first, false); err != nil {
		f.fail(err)
		return nil, fuse.EIO
	}
	return fuse.ReadResultData(buf), fuse.OK
}

// record notes that pages were touched.
func (f *files) record(first, count uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for p := first; p < first+count; p++ {
		if !f.closed && f.memory.has(p) && !f.touched[p] && len(f.order) < prefetch.MaxPages {
			f.touched[p] = true
			f.order = append(f.order, p)
		}
	}
}

// trace returns what was touched so far and ends the recording.
func (f *files) trace() []uint32 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return slices.Clone(f.order)
}

// fetchBatch is how many pages are fetched ahead at once: they are sorted, so
// that neighbours are read and handed over together.
const fetchBatch = 256

// fetch gives pages to the kernel before it asks for them, in about the order of
// the plan, until all are there or the file is no longer in use.
func (f *files) fetch(plan []uint32, store func(offset int64, data []byte) fuse.Status) error {
	buf := make([]byte, 0, fetchBatch*vmm.PageSize)
	for batch := range slices.Chunk(plan, fetchBatch) {
		batch = slices.DeleteFunc(slices.Clone(batch), func(p uint32) bool { return !f.memory.has(p) })
		slices.Sort(batch)
		for len(batch) > 0 {
			n := 1
			for n < len(batch) && batch[n] == batch[0]+uint32(n) {
				n++
			}
			part := buf[:n*vmm.PageSize]
			if err := f.memory.read(part, batch[0], true); err != nil {
				return err
			}
			switch status := store(int64(batch[0])*vmm.PageSize, part); status {
			case fuse.OK:
			case fuse.ENOENT, fuse.ENODEV:
				return nil // nobody has the file open
			default:
				return fmt.Errorf("hand pages to the kernel: %w", errors.New(status.String()))
			}
			batch = batch[n:]
		}
	}
	return nil
}
