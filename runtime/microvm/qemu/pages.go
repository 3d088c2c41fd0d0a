package qemu

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/runtime/microvm/vmm"
)

// memoryMap is where the guest's memory lies in QEMU's address space.
type memoryMap struct {
	pid     int
	areas   []area // in the order of guest memory, without gaps
	pagemap *os.File
}

// area is one mapping of guest memory.
type area struct {
	address uint64 // in QEMU
	first   uint32 // page of the guest
	pages   uint32
	shared  bool // writes go to the file
}

// findMemory looks up the mappings. They do not move while QEMU lives.
func (m *machine) findMemory() (*memoryMap, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.memory != nil {
		return m.memory, nil
	}
	pid := m.proc.PID
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	mm := &memoryMap{pid: pid}
	for s := bufio.NewScanner(f); s.Scan(); {
		if a, ok := parseMapping(s.Text()); ok {
			mm.areas = append(mm.areas, a)
		}
	}
	slices.SortFunc(mm.areas, func(a, b area) int { return int(a.first) - int(b.first) })
	next := uint32(0)
	for _, a := range mm.areas {
		if a.first != next {
			return nil, fmt.Errorf("QEMU does not map the guest's memory as one whole")
		}
		next += a.pages
	}
	if next == 0 {
		return nil, errors.New("QEMU does not map the guest's memory")
	}
	if mm.pagemap, err = os.Open(fmt.Sprintf("/proc/%d/pagemap", pid)); err != nil {
		return nil, err
	}
	m.memory = mm
	return mm, nil
}

// parseMapping reads one line of /proc/PID/maps; ok is false when it is not of
// guest memory.
func parseMapping(line string) (a area, ok bool) {
	fields := strings.Fields(line)
	// A memfd, or the one file of a pager's file system.
	if len(fields) < 6 || !strings.HasPrefix(fields[5], "/memfd:"+vmm.MemoryName) && fields[5] != "/"+vmm.MemoryName {
		return a, false
	}
	from, to, _ := strings.Cut(fields[0], "-")
	begin, err1 := strconv.ParseUint(from, 16, 64)
	end, err2 := strconv.ParseUint(to, 16, 64)
	offset, err3 := strconv.ParseUint(fields[2], 16, 64)
	if errors.Join(err1, err2, err3) != nil || end <= begin {
		return a, false
	}
	return area{
		address: begin, first: uint32(offset / vmm.PageSize), pages: uint32((end - begin) / vmm.PageSize),
		shared: strings.HasSuffix(fields[1], "s"),
	}, true
}

// Close lets the mappings go.
func (mm *memoryMap) Close() error { return mm.pagemap.Close() }

// The bits of an entry of /proc/PID/pagemap.
const (
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pageOfFile  = 1 << 61 // still the file's: not changed
)

// Changed finds the pages that are the machine's own.
func (m *machine) Changed() ([]vmm.Run, error) {
	mm, err := m.findMemory()
	if err != nil {
		return nil, err
	}
	if mm.areas[0].shared {
		return mm.allocated()
	}
	return m.find(changed)
}

// allocated finds the pages that the file has which QEMU maps. Its page table does
// not tell: pages of a file leave it when they are swapped out.
func (mm *memoryMap) allocated() (runs []vmm.Run, err error) {
	a := mm.areas[0]
	end := a.address + uint64(a.pages)*vmm.PageSize
	f, err := os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", mm.pid, a.address, end))
	if err != nil {
		return nil, fmt.Errorf("open QEMU's memory: %w", err)
	}
	defer f.Close()
	for at := int64(0); ; {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return runs, nil // nothing but a hole is left
		}
		if err == nil {
			at, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
		}
		if err != nil {
			return nil, fmt.Errorf("look for pages of QEMU's memory: %w", err)
		}
		runs = append(runs, vmm.Run{First: uint32(from / vmm.PageSize), Count: uint32((at - from) / vmm.PageSize)})
	}
}

// changed reports whether an entry of a page table is of a page of the process's own.
func changed(entry uint64) bool {
	return entry&(pagePresent|pageSwapped) != 0 && entry&pageOfFile == 0
}

// Touched finds the pages that QEMU has in its page table.
func (m *machine) Touched() ([]vmm.Run, error) {
	return m.find(func(entry uint64) bool { return entry&(pagePresent|pageSwapped) != 0 })
}

// find finds the pages with entries in QEMU's page table that match.
func (m *machine) find(match func(entry uint64) bool) ([]vmm.Run, error) {
	mm, err := m.findMemory()
	if err != nil {
		return nil, err
	}
	var runs []vmm.Run
	buf := make([]byte, 256<<10)
	for _, a := range mm.areas {
		for done := uint32(0); done < a.pages; {
			part := buf[:min(len(buf), int(a.pages-done)*8)]
			at := int64(a.address/vmm.PageSize+uint64(done)) * 8
			if _, err := mm.pagemap.ReadAt(part, at); err != nil {
				return nil, fmt.Errorf("read QEMU's page table: %w", err)
			}
			runs = appendMatching(runs, part, a.first+done, match)
			done += uint32(len(part) / 8)
		}
	}
	return runs, nil
}

// appendMatching adds the pages among entries of a page table that match; the
// entries begin with that of the page first.
func appendMatching(runs []vmm.Run, entries []byte, first uint32, match func(entry uint64) bool) []vmm.Run {
	for i := 0; i+8 <= len(entries); i += 8 {
		if !match(binary.LittleEndian.Uint64(entries[i:])) {
			continue
		}
		page := first + uint32(i/8)
		if n := len(runs); n > 0 && runs[n-1].First+runs[n-1].Count == page {
			runs[n-1].Count++
		} else {
			runs = append(runs, vmm.Run{First: page, Count: 1})
		}
	}
	return runs
}

// ReadPages copies pages from the guest's memory.
func (m *machine) ReadPages(buf []byte, first uint32) error {
	return m.eachPart(buf, first, func(part []byte, address uint64) error {
		n, err := unix.ProcessVMReadv(m.proc.PID, iovec(part), remote(address, len(part)), 0)
		if err == nil && n != len(part) {
			err = fmt.Errorf("only %d of %d bytes are there", n, len(part))
		}
		return err
	})
}

// WritePages copies pages into the guest's memory.
func (m *machine) WritePages(buf []byte, first uint32) error {
	return m.eachPart(buf, first, func(part []byte, address uint64) error {
		n, err := unix.ProcessVMWritev(m.proc.PID, iovec(part), remote(address, len(part)), 0)
		if err == nil && n != len(part) {
			err = fmt.Errorf("only %d of %d bytes were written", n, len(part))
		}
		return err
	})
}

func iovec(b []byte) []unix.Iovec {
	iov := unix.Iovec{Base: &b[0]}
	iov.SetLen(len(b))
	return []unix.Iovec{iov}
}

func remote(address uint64, n int) []unix.RemoteIovec {
	return []unix.RemoteIovec{{Base: uintptr(address), Len: n}}
}

// eachPart calls f for the part of buf in each mapping.
func (m *machine) eachPart(buf []byte, first uint32, f func(part []byte, address uint64) error) error {
	mm, err := m.findMemory()
	if err != nil {
		return err
	}
	for _, a := range mm.areas {
		if first < a.first || first >= a.first+a.pages || len(buf) == 0 {
			continue
		}
		n := min(len(buf), int(a.first+a.pages-first)*vmm.PageSize)
		if err := f(buf[:n], a.address+uint64(first-a.first)*vmm.PageSize); err != nil {
			return fmt.Errorf("copy the guest's memory: %w", err)
		}
		buf, first = buf[n:], first+uint32(n/vmm.PageSize)
	}
	if len(buf) > 0 {
		return fmt.Errorf("page %d is beyond the guest's memory", first)
	}
	return nil
}
