package microvm

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"unsafe"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/pager"
	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// A page file holds some pages of a guest's memory: a header, which says which,
// padded to a whole number of pages, and the pages in ascending order. Integers
// are little endian.
//
//	magic    8 bytes
//	size     8 bytes, of the whole memory
//	runs     4 bytes, how many
//	each run: first page, number of pages; 4 bytes each
//
// Behind the pages are the sums of all before them, piece by piece, so that pages
// can be read at random and checked.
const (
	pagesMagic  = "atollpg1"
	pagesFixed  = 20
	pagesBuffer = 1 << 20 // bytes copied at once
)

// pageFile is a page file on disk.
type pageFile struct {
	Name   string `json:"name"`   // in the directory of its owner
	Digest string `json:"digest"` // "blake3:hex" of header and pages
	Bytes  int64  `json:"bytes"`  // of pages in it
	// Sums is the digest of the sums behind the pages; empty: there are none, as in
	// files of earlier versions.
	Sums string `json:"sums,omitempty"`
	// Whole is the digest of the file with its sums, by which other nodes know it;
	// empty: as Sums, or it is not known.
	Whole string `json:"whole,omitempty"`
}

// file is the digest of the file as it is on disk.
func (p pageFile) file() string { return cmp.Or(p.Whole, p.Digest) }

// pagesHeader makes the header of a page file.
func pagesHeader(size int64, runs []vmm.Run) []byte {
	b := append(make([]byte, 0, pagesFixed+8*len(runs)), pagesMagic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(size))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(runs)))
	for _, r := range runs {
		b = binary.LittleEndian.AppendUint32(b, r.First)
		b = binary.LittleEndian.AppendUint32(b, r.Count)
	}
	return append(b, make([]byte, -len(b)&(vmm.PageSize-1))...)
}

// parsePagesHeader reads the header of a page file, which may come from another
// host, and its length.
func parsePagesHeader(in io.Reader) (size int64, runs []vmm.Run, length int64, err error) {
	fixed := make([]byte, pagesFixed)
	if _, err := io.ReadFull(in, fixed); err != nil {
		return 0, nil, 0, fmt.Errorf("memory is cut short: %w", err)
	}
	size = int64(binary.LittleEndian.Uint64(fixed[8:]))
	count := binary.LittleEndian.Uint32(fixed[16:])
	pages := uint64(size) / vmm.PageSize
	if string(fixed[:8]) != pagesMagic || size <= 0 || size%vmm.PageSize != 0 || pages > 1<<32-1 || uint64(count) > pages {
		return 0, nil, 0, errors.New("memory is damaged or of another version")
	}
	next := uint64(0)
	var entry [8]byte
	for range count {
		if _, err := io.ReadFull(in, entry[:]); err != nil {
			return 0, nil, 0, fmt.Errorf("memory is cut short: %w", err)
		}
		r := vmm.Run{First: binary.LittleEndian.Uint32(entry[:]), Count: binary.LittleEndian.Uint32(entry[4:])}
		if uint64(r.First) < next || r.Count == 0 || uint64(r.First)+uint64(r.Count) > pages {
			return 0, nil, 0, errors.New("memory is damaged: its pages are out of order")
		}
		next = uint64(r.First) + uint64(r.Count)
		runs = append(runs, r)
	}
	length = pagesFixed + 8*int64(count)
	return size, runs, length + (-length & (vmm.PageSize - 1)), nil
}

// pagesBytes is how many bytes the runs have together.
func pagesBytes(runs []vmm.Run) (n int64) {
	for _, r := range runs {
		n += int64(r.Count) * vmm.PageSize
	}
	return n
}

// writePages makes a page file of what read gives. It is not synced.
func writePages(path string, size int64, runs []vmm.Run, read func(buf []byte, first uint32) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(pagesHeader(size, runs)); err != nil {
		return err
	}
	buf, filled := make([]byte, pagesBuffer), 0
	for _, r := range runs {
		for r.Count > 0 {
			n := min(int(r.Count), (len(buf)-filled)/vmm.PageSize)
			if err := read(buf[filled:filled+n*vmm.PageSize], r.First); err != nil {
				return err
			}
			filled, r.First, r.Count = filled+n*vmm.PageSize, r.First+uint32(n), r.Count-uint32(n)
			if filled == len(buf) {
				if _, err := f.Write(buf); err != nil {
					return err
				}
				filled = 0
			}
		}
	}
	_, err = f.Write(buf[:filled])
	return err
}

// finishPages adds the sums to a page file, syncs and describes it.
func finishPages(dir, name string) (pageFile, error) {
	p := pageFile{Name: name}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if err != nil {
		return p, err
	}
	defer f.Close()
	_, runs, _, err := parsePagesHeader(bufio.NewReader(f))
	if err != nil {
		return p, err
	}
	p.Bytes = pagesBytes(runs)
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return p, err
	}
	hash, pieces := blake3.New(), new(pager.Summer)
	if _, err := io.Copy(io.MultiWriter(hash, pieces), f); err != nil {
		return p, err
	}
	sums := pieces.Sums()
	p.Digest, p.Sums = digestOf(hash), digestOfBytes(sums)
	_, _ = hash.Write(sums) // never fails
	p.Whole = digestOf(hash)
	if _, err := f.Write(sums); err != nil { // where the copy ended
		return p, err
	}
	return p, f.Sync()
}

func digestOf(hash *blake3.Hasher) string { return "blake3:" + hex.EncodeToString(hash.Sum(nil)) }

// errDamaged says that a file is not what it was when it was written.
var errDamaged = pager.ErrDamaged

// readPages hands the pages of a file to write, after which it fails if they were
// not those that the digest promises. size is of the memory.
func (p pageFile) readPages(dir string, size int64, write func(buf []byte, first uint32) error) error {
	f, err := os.Open(filepath.Join(dir, p.Name))
	if err != nil {
		return err
	}
	defer f.Close()
	hash := blake3.New()
	in := io.TeeReader(bufio.NewReaderSize(f, 64<<10), hash)
	have, runs, length, err := parsePagesHeader(in)
	if err != nil {
		return fmt.Errorf("%s: %w", p.Name, err)
	}
	if have != size {
		return fmt.Errorf("%s is of a memory of %d bytes, not %d", p.Name, have, size)
	}
	if _, err := io.CopyN(io.Discard, in, length-pagesFixed-8*int64(len(runs))); err != nil {
		return fmt.Errorf("%s: %w", p.Name, err)
	}
	buf := make([]byte, pagesBuffer)
	for _, r := range runs {
		for r.Count > 0 {
			n := min(int(r.Count), len(buf)/vmm.PageSize)
			part := buf[:n*vmm.PageSize]
			if _, err := io.ReadFull(in, part); err != nil {
				return fmt.Errorf("%s: %w", p.Name, err)
			}
			if err := write(part, r.First); err != nil {
				return err
			}
			r.First, r.Count = r.First+uint32(n), r.Count-uint32(n)
		}
	}
	if got := digestOf(hash); got != p.Digest {
		return fmt.Errorf("%s: %w", p.Name, errDamaged)
	}
	return nil
}

// mapMemory maps a memfd for reading; unmap ends that.
func mapMemory(memory *os.File, size int64) (b []byte, unmap func(), err error) {
	b, err = unix.Mmap(int(memory.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map memory: %w", err)
	}
	return b, func() { _ = unix.Munmap(b) }, nil
}

// dumpMemory writes all of a sealed memory into a page file in dir, and syncs it.
func dumpMemory(memory *os.File, size int64, dir, name string) (pageFile, error) {
	mapped, unmap, err := mapMemory(memory, size)
	if err != nil {
		return pageFile{}, err
	}
	defer unmap()
	runs, err := usedPages(memory, mapped)
	if err != nil {
		return pageFile{}, err
	}
	err = writePages(filepath.Join(dir, name), size, runs, func(buf []byte, first uint32) error {
		copy(buf, mapped[int64(first)*vmm.PageSize:])
		return nil
	})
	if err != nil {
		return pageFile{}, err
	}
	return finishPages(dir, name)
}

// usedPages finds the pages of a memfd that are not all zeros.
func usedPages(memory *os.File, mapped []byte) ([]vmm.Run, error) {
	var runs []vmm.Run
	for at := int64(0); at < int64(len(mapped)); {
		begin, err := unix.Seek(int(memory.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // nothing but a hole up to the end
		}
		if err != nil {
			return nil, err
		}
		end, err := unix.Seek(int(memory.Fd()), begin, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		for page := begin / vmm.PageSize; page*vmm.PageSize < end; page++ {
			if isZero(mapped[page*vmm.PageSize:][:vmm.PageSize]) {
				continue
			}
			if n := len(runs); n > 0 && int64(runs[n-1].First+runs[n-1].Count) == page {
				runs[n-1].Count++
			} else {
				runs = append(runs, vmm.Run{First: uint32(page), Count: 1})
			}
		}
		at = end
	}
	return runs, nil
}

// isZero reports whether a page holds nothing but zeros.
func isZero(page []byte) bool {
	words := unsafe.Slice((*uint64)(unsafe.Pointer(&page[0])), len(page)/8)
	for _, w := range words {
		if w != 0 {
			return false
		}
	}
	return true
}
