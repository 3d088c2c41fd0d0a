package move

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
)

// stream builds what QEMU would send.
type stream struct{ bytes.Buffer }

func (s *stream) u32(n uint32) { s.Write(binary.BigEndian.AppendUint32(nil, n)) }
func (s *stream) u64(n uint64) { s.Write(binary.BigEndian.AppendUint64(nil, n)) }
func (s *stream) name(n string) {
	s.WriteByte(byte(len(n)))
	s.WriteString(n)
}

func (s *stream) footer() {
	s.u64(flagEnd)
	s.WriteByte(0x7e)
	s.u32(2)
}

const romSize = 2 * pageSize

// begin writes the start with a memory of so many pages and a ROM.
func (s *stream) begin(pages int) {
	s.WriteString(streamMagic)
	s.u32(streamVersion)
	s.WriteByte(sectionStart)
	s.u32(2)
	s.name(ramName)
	s.u32(0)
	s.u32(4)
	s.u64(uint64(pages)*pageSize + romSize | flagMemSize)
	s.name("main")
	s.u64(uint64(pages) * pageSize)
	s.name("rom")
	s.u64(romSize)
	s.footer()
}

// pages writes a section with pages of the memory.
func (s *stream) pages(kind byte, memory []byte, numbers ...int) {
	s.WriteByte(kind)
	s.u32(2)
	for i, n := range numbers {
		page := memory[n*pageSize:][:pageSize]
		flag := uint64(flagPage)
		if bytes.Equal(page, zeroPage[:]) {
			flag = flagZero
		}
		if i > 0 {
			flag |= flagContinue
		}
		s.u64(uint64(n)*pageSize | flag)
		if i == 0 {
			s.name("main")
		}
		if flag&flagZero != 0 {
			s.WriteByte(0)
		} else {
			s.Write(page)
		}
	}
	s.footer()
}

func (s *stream) end() {
	s.WriteByte(4)
	s.WriteString("devices")
}

// apply does with a stream what QEMU would do to its memory.
func apply(t *testing.T, memory []byte, r io.Reader) (rest []byte) {
	t.Helper()
	p := newParser(r)
	for {
		it, err := p.next()
		if errors.Is(err, io.EOF) {
			return rest
		}
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case it.block == "main":
			copy(memory[it.addr:], it.page)
		case it.raw != nil && p.in.Buffered() == 0:
			rest = bytes.Clone(it.raw)
		}
	}
}

// file is one in memory, up to 1 MiB.
type file []byte

func (f *file) WriteAt(p []byte, at int64) (int, error) {
	if at+int64(len(p)) > 1<<20 {
		return 0, io.ErrShortWrite
	}
	if grown := int(at) + len(p) - len(*f); grown > 0 {
		*f = append(*f, make([]byte, grown)...)
	}
	return copy((*f)[at:], p), nil
}

// changing is a file that is another one at each look.
type changing struct{ looks [][]byte }

func (c *changing) ReadAt(p []byte, at int64) (int, error) {
	return bytes.NewReader(c.looks[0]).ReadAt(p, at)
}

func TestADiskIsSentAgainWhereItHasChanged(t *testing.T) {
	first := randomMemory(100, 1)
	second := append(bytes.Clone(first), "and more"...)
	second[3*blockSize]++
	var arrived file
	from := &changing{[][]byte{first, second, second}}
	l := newLayer(from)
	var sent []int
	for len(from.looks) > 0 {
		n := 0
		err := l.changed(func(block uint32, data []byte) {
			n++
			_, _ = arrived.WriteAt(data, int64(block)*blockSize)
		})
		if err != nil {
			t.Fatal(err)
		}
		sent = append(sent, n)
		from.looks = from.looks[1:]
	}
	if !bytes.Equal(arrived, second) || sent[0] != 7 || sent[1] != 2 || sent[2] != 0 {
		t.Errorf("sent %v, and it is the same: %v", sent, bytes.Equal(arrived, second))
	}
}

func randomMemory(pages int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 2))
	memory := make([]byte, pages*pageSize)
	for n := range pages {
		if r.IntN(3) > 0 {
			for i := range 200 {
				memory[n*pageSize+i*8] = byte(r.Uint32())
			}
		}
	}
	return memory
}

func TestWhatArrivesIsTheMemoryThatLeft(t *testing.T) {
	const pages = 300
	base := randomMemory(pages, 1)
	source := bytes.Clone(base)
	image := randomMemory(41, 7)[:40*pageSize+5]
	var s stream
	s.begin(pages)
	r := rand.New(rand.NewPCG(3, 4))
	all := make([]int, pages)
	for i := range all {
		all[i] = i
	}
	s.pages(sectionPart, source, all...)
	for range 20 { // rounds in which some pages change: to anything, to zero, and back
		var changed []int
		for range 30 {
			n := r.IntN(pages)
			page := source[n*pageSize:][:pageSize]
			switch r.IntN(4) {
			case 0:
				clear(page)
			case 3:
				copy(page, image[r.IntN(40)*pageSize:])
			case 1:
				copy(page, base[n*pageSize:])
			default:
				page[r.IntN(pageSize)]++
			}
			changed = append(changed, n)
		}
		s.pages(sectionPart, source, changed...)
	}
	s.WriteByte(sectionPart) // a page of the ROM
	s.u32(2)
	s.u64(pageSize | flagPage)
	s.name("rom")
	s.Write(bytes.Repeat([]byte{7}, pageSize))
	s.footer()
	s.pages(sectionEnd, source, 0, 1, 2)
	s.end()
	stream := s.Bytes()
	over := bytes.Clone(source[5*pageSize:][:pageSize])
	over[1]++
	disk := randomMemory(40, 9)[:39*pageSize+100]
	for name, b := range map[string]Base{
		"a template": {Memory: base, Digest: "t"}, "nothing": {},
		"an image":   {Memory: base, Image: bytes.NewReader(image), Digest: "i"},
		"a snapshot": {Memory: base, Over: map[uint32][]byte{5: over, 6: source[6*pageSize:][:pageSize]}, Digest: "s"},
	} {
		var wire, out bytes.Buffer
		var layer file
		sent, err := Send(&wire, bytes.NewReader(stream), b, bytes.NewReader(disk))
		if err != nil {
			t.Fatal(err)
		}
		got, err := Receive(&out, &wire, b, &layer)
		if err != nil {
			t.Fatal(err)
		}
		arrived := make([]byte, len(source))
		copy(arrived, b.Memory)
		for n, page := range b.Over {
			copy(arrived[int(n)*pageSize:], page)
		}
		if !bytes.Equal(layer, disk) || sent.Blocks != got.Blocks {
			t.Errorf("on %s: the disk is another, %d blocks of %d", name, got.Blocks, sent.Blocks)
		}
		rest := apply(t, arrived, &out)
		if !bytes.Equal(arrived, source) || string(rest) != "devices" {
			t.Errorf("on %s: the memory is the same: %v; devices: %q", name, bytes.Equal(arrived, source), rest)
		}
		if sent.Pages != pages+20*30+3 || got.Pages != sent.Zero+sent.Found+sent.Changed || got.Found != sent.Found || (sent.Found > 0) != (b.Image != nil) || sent.Wire != got.Wire {
			t.Errorf("on %s: %+v were sent, %+v received", name, sent, got)
		}
		if b.Memory != nil && sent.Equal < pages {
			t.Errorf("%d pages were left out, of %d that did not change", sent.Equal, pages)
		}
	}
}

func TestDamageAndAnotherTemplateAreNoticed(t *testing.T) {
	memory := randomMemory(20, 5)
	var s stream
	s.begin(20)
	s.pages(sectionPart, memory, 1, 2, 3)
	s.end()
	var sent bytes.Buffer
	if _, err := Send(&sent, &s, Base{Digest: "a"}, nil); err != nil {
		t.Fatal(err)
	}
	wire := sent.Bytes()
	if _, err := Receive(io.Discard, bytes.NewReader(wire), Base{Digest: "b"}, nil); !errors.Is(err, ErrBase) {
		t.Errorf("with another template: %v", err)
	}
	var good bytes.Buffer
	if _, err := Receive(&good, bytes.NewReader(wire), Base{Digest: "a"}, nil); err != nil {
		t.Fatal(err)
	}
	for cut := range len(wire) {
		var out bytes.Buffer
		if _, err := Receive(&out, bytes.NewReader(wire[:cut]), Base{Digest: "a"}, nil); err == nil && !bytes.Equal(out.Bytes(), good.Bytes()) {
			t.Fatalf("cut after %d of %d bytes: no error", cut, len(wire))
		}
	}
	for i := range wire {
		bad := bytes.Clone(wire)
		bad[i] ^= 1
		var out bytes.Buffer
		_, err := Receive(&out, bytes.NewReader(bad), Base{Digest: "a"}, nil)
		if err == nil && !bytes.Equal(out.Bytes(), good.Bytes()) {
			t.Fatalf("byte %d is damaged: no error", i)
		}
	}
	if _, err := Send(io.Discard, strings.NewReader("QEVM\x00\x00\x00\x03\x01"), Base{}, nil); err == nil {
		t.Error("a stream that is cut short is sent as if it were whole")
	}
}

func FuzzQEMUStream(f *testing.F) {
	var s stream
	s.begin(3)
	s.pages(sectionPart, make([]byte, 3*pageSize), 0, 1, 2) // zeros: long inputs are mutated slowly
	s.end()
	f.Add(s.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		p := newParser(bytes.NewReader(data))
		passed := 0
		for {
			it, err := p.next()
			if err != nil {
				break
			}
			if it.raw == nil && (len(it.page) != pageSize || it.addr%pageSize != 0 || it.addr >= p.blocks[it.block]) {
				t.Fatalf("page %#x of %q with %d bytes", it.addr, it.block, len(it.page))
			}
			passed += len(it.raw)
		}
		if passed > len(data) {
			t.Fatalf("%d bytes became %d", len(data), passed)
		}
	})
}

func FuzzWire(f *testing.F) {
	f.Add([]byte("D\x00\x00\x00\x01\x00\x00\x00\x02hi"))
	f.Add([]byte("B\x00\x00\x00\x02\x04mainF\x00\x00\x00\x01\x00\x00\x00\x00"))
	f.Add([]byte("B\x00\x00\x00\x02\x04mainZ\x00\x00\x00\x01R\x00\x00\x00\x02hi"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var plain bytes.Buffer
		plain.Write(data)
		r := newReceiver(io.Discard, &plain, Base{Image: strings.NewReader("an image")}, new(file))
		for range 1000 {
			if done, err := r.record(); done || err != nil {
				break
			}
		}
	})
}
