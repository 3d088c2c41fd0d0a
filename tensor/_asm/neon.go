package main

import (
	"fmt"
	"math"
	"os"
	"strings"
)

// Go's assembler knows few of NEON's instructions and avo none, so they are written here as words, with their usual names as
// comments. Loads, stores and loops are Go's own.

// A quad128 is one of the 32 vector registers.
type quad128 int

// neonPool has the address of constants. Kernels use R0 to R17; what else there is belongs to Go.
const neonPool = "R17"

// A neon writes one kernel.
type neon struct {
	*neonFile
	name    string
	dotprod bool
	start   strings.Builder // what comes before all else: constants
	body    strings.Builder
	free    [32]bool
	highest quad128            // of those that were ever free to be written over
	held    map[string]quad128 // constants; they are taken from V31 down
	pooled  bool
}

// A neonFile is what all kernels share.
type neonFile struct {
	text, stubs strings.Builder
	floats      []uint32 // constants of one 32-bit word in all lanes
	tables      map[string][4]uint32
	order       []string // of tables
}

func (f *neonFile) kernel(name string, dotprod bool) *neon {
	n := &neon{neonFile: f, name: name, dotprod: dotprod, held: map[string]quad128{}}
	for i := range n.free {
		n.free[i] = true
	}
	return n
}

// end writes the kernel, whose arguments take bytes, with its declaration.
func (n *neon) end(signature string, bytes int, doc ...string) {
	n.op("RET")
	fmt.Fprintf(&n.text, "// func %s%s\nTEXT ·%s(SB), NOSPLIT, $0-%d\n", n.name, signature, n.name, bytes)
	if n.pooled {
		fmt.Fprintf(&n.text, "\tMOVD $neonFloats<>(SB), %s\n", neonPool)
	}
	n.text.WriteString(n.start.String() + n.body.String() + "\n")
	fmt.Fprintf(&n.stubs, "// %s %s\n//\n//go:noescape\nfunc %s%s\n\n", n.name, strings.Join(doc, "\n// "), n.name, signature)
}

// alloc takes the lowest free register, drop gives it back.
func (n *neon) alloc() quad128 {
	for i := range n.free {
		if n.free[i] {
			n.free[i] = false
			n.highest = max(n.highest, quad128(i))
			return quad128(i)
		}
	}
	panic(n.name + ": no register is free")
}

func (n *neon) drop(rs ...quad128) {
	for _, r := range rs {
		n.free[r] = true
	}
}

// hold takes a register that has a constant from the beginning on.
func (n *neon) hold(name string, set func(r quad128)) quad128 {
	if r, ok := n.held[name]; ok {
		return r
	}
	r := quad128(31 - len(n.held))
	if r <= n.highest {
		panic(n.name + ": no register for " + name)
	}
	n.held[name], n.free[r] = r, false
	body := n.body
	n.body = strings.Builder{}
	set(r)
	n.start.WriteString(n.body.String())
	n.body = body
	return r
}

// bytes is b in every byte.
func (n *neon) bytes(b byte) quad128 {
	return n.hold(fmt.Sprint("bytes", b), func(r quad128) {
		v := uint32(b)
		n.word(0x4f00e400|v>>5<<16|v&31<<5|uint32(r), "movi v%d.16b, #%d", r, b)
	})
}

// lanes is w in every lane of 32 bits.
func (n *neon) lanes(w uint32) quad128 {
	return n.hold(fmt.Sprint("lanes", w), func(r quad128) { n.float(r, math.Float32frombits(w)) })
}

// table is 16 bytes.
func (n *neon) table(name string, words [4]uint32) quad128 {
	if _, ok := n.tables[name]; !ok {
		n.order = append(n.order, name)
	}
	n.tables[name] = words
	return n.hold(name, func(r quad128) {
		n.op("MOVD $neon%s<>(SB), R16", name)
		n.op("FMOVQ (R16), F%d", r)
	})
}

// float sets every lane to f.
func (n *neon) float(r quad128, f float32) {
	bits, at := math.Float32bits(f), -1
	for i, w := range n.floats {
		if w == bits {
			at = i
		}
	}
	if at < 0 {
		at = len(n.floats)
		n.floats = append(n.floats, bits)
	}
	n.pooled = true
	n.op("FMOVQ %d(%s), F%d", 16*at, neonPool, r)
}

func (n *neon) op(format string, args ...any) { fmt.Fprintf(&n.body, "\t"+format+"\n", args...) }

func (n *neon) label(name string) { fmt.Fprintf(&n.body, "%s:\n", name) }

func (n *neon) word(w uint32, format string, args ...any) {
	fmt.Fprintf(&n.body, "\tWORD $0x%08x // %s\n", w, fmt.Sprintf(format, args...))
}

// load reads 16, 8 or 4 bytes.
func (n *neon) load(size int, base string, offset int) quad128 {
	r := n.alloc()
	n.op("%s %d(%s), F%d", map[int]string{4: "FMOVS", 8: "FMOVD", 16: "FMOVQ"}[size], offset, base, r)
	return r
}

func (n *neon) store(r quad128, base string, offset int) { n.op("FMOVQ F%d, %d(%s)", r, offset, base) }

// An instruction of two or three registers, by its bits.
type instruction struct {
	bits uint32
	name string
	a    [3]string // arrangements of the result and the operands
}

func same(bits uint32, name, a string) instruction {
	return instruction{bits, name, [3]string{a, a, a}}
}

var (
	iADD   = same(0x4ea08400, "add", "4s")
	iADDH  = same(0x4e608400, "add", "8h")
	iSUB   = same(0x6ea08400, "sub", "4s")
	iMUL   = same(0x4ea09c00, "mul", "4s")
	iADDP  = same(0x4ea0bc00, "addp", "4s")
	iAND   = same(0x4e201c00, "and", "16b")
	iORR   = same(0x4ea01c00, "orr", "16b")
	iEOR   = same(0x6e201c00, "eor", "16b")
	iFADD  = same(0x4e20d400, "fadd", "4s")
	iFSUB  = same(0x4ea0d400, "fsub", "4s")
	iFMUL  = same(0x6e20dc00, "fmul", "4s")
	iFDIV  = same(0x6e20fc00, "fdiv", "4s")
	iFMLA  = same(0x4e20cc00, "fmla", "4s")
	iFMLS  = same(0x4ea0cc00, "fmls", "4s")
	iFMAX  = same(0x4e20f400, "fmax", "4s")
	iFMIN  = same(0x4ea0f400, "fmin", "4s")
	iFADDP = same(0x6e20d400, "faddp", "4s")
	iFCMGT = same(0x6ea0e400, "fcmgt", "4s")
	iFCMGE = same(0x6e20e400, "fcmge", "4s")
	iZIP1B = same(0x4e003800, "zip1", "16b")
	iZIP2B = same(0x4e007800, "zip2", "16b")
	iZIP1H = same(0x4e403800, "zip1", "8h")
	iZIP2H = same(0x4e407800, "zip2", "8h")

	iSMULL  = instruction{0x0e20c000, "smull", [3]string{"8h", "8b", "8b"}}
	iSMULL2 = instruction{0x4e20c000, "smull2", [3]string{"8h", "16b", "16b"}}
	iSMLAL  = instruction{0x0e208000, "smlal", [3]string{"8h", "8b", "8b"}}
	iSMLAL2 = instruction{0x4e208000, "smlal2", [3]string{"8h", "16b", "16b"}}

	iSADDLP  = instruction{0x4e602800, "saddlp", [3]string{"4s", "8h"}}
	iSCVTF   = instruction{0x4e21d800, "scvtf", [3]string{"4s", "4s"}}
	iFCVTNS  = instruction{0x4e21a800, "fcvtns", [3]string{"4s", "4s"}}
	iFRINTN  = instruction{0x4e218800, "frintn", [3]string{"4s", "4s"}}
	iFABS    = instruction{0x4ea0f800, "fabs", [3]string{"4s", "4s"}}
	iFNEG    = instruction{0x6ea0f800, "fneg", [3]string{"4s", "4s"}}
	iFCVTL   = instruction{0x0e217800, "fcvtl", [3]string{"4s", "4h"}}
	iFCVTL2  = instruction{0x4e217800, "fcvtl2", [3]string{"4s", "8h"}}
	iXTNH    = instruction{0x0e612800, "xtn", [3]string{"4h", "4s"}}
	iXTN2H   = instruction{0x4e612800, "xtn2", [3]string{"8h", "4s"}}
	iXTNB    = instruction{0x0e212800, "xtn", [3]string{"8b", "8h"}}
	iXTN2B   = instruction{0x4e212800, "xtn2", [3]string{"16b", "8h"}}
	iFMAXV   = instruction{0x6e30f800, "fmaxv", [3]string{"s", "4s"}}
	iADDV    = instruction{0x4eb1b800, "addv", [3]string{"s", "4s"}}
	iSHLLB   = instruction{0x2e213800, "shll", [3]string{"8h", "8b"}}
	iSHLLB2  = instruction{0x6e213800, "shll2", [3]string{"8h", "16b"}}
	iSSHLLB  = instruction{0x0f08a400, "sxtl", [3]string{"8h", "8b"}}
	iSSHLLB2 = instruction{0x4f08a400, "sxtl2", [3]string{"8h", "16b"}}
	iSSHLLH  = instruction{0x0f10a400, "sxtl", [3]string{"4s", "4h"}}
	iSSHLLH2 = instruction{0x4f10a400, "sxtl2", [3]string{"4s", "8h"}}
	iUSHLLH  = instruction{0x2f10a400, "uxtl", [3]string{"4s", "4h"}}
)

// do emits one of three registers, one one of two.
func (n *neon) do(i instruction, d, a, b quad128) {
	n.word(i.bits|uint32(b)<<16|uint32(a)<<5|uint32(d), "%s v%d.%s, v%d.%s, v%d.%s", i.name, d, i.a[0], a, i.a[1], b, i.a[2])
}

func (n *neon) one(i instruction, d, a quad128) {
	to := fmt.Sprintf("v%d.%s", d, i.a[0])
	if i.a[0] == "s" {
		to = fmt.Sprintf("s%d", d)
	}
	n.word(i.bits|uint32(a)<<5|uint32(d), "%s %s, v%d.%s", i.name, to, a, i.a[1])
}

func (n *neon) copy(d, a quad128) { n.do(iORR, d, a, a) }

// dup sets all lanes to lane i of a.
func (n *neon) dup(d, a quad128, i int) {
	n.word(0x4e040400|uint32(i)<<19|uint32(a)<<5|uint32(d), "dup v%d.4s, v%d.s[%d]", d, a, i)
}

// element is the bits of operand b, of which only lane i counts.
func element(b quad128, i int) uint32 { return uint32(b)<<16 | uint32(i&1)<<21 | uint32(i>>1)<<11 }

// fmla adds a times lane i of b; fmls subtracts it.
func (n *neon) fmla(d, a, b quad128, i int) {
	n.word(0x4f801000|element(b, i)|uint32(a)<<5|uint32(d), "fmla v%d.4s, v%d.4s, v%d.s[%d]", d, a, b, i)
}

func (n *neon) fmls(d, a, b quad128, i int) {
	n.word(0x4f805000|element(b, i)|uint32(a)<<5|uint32(d), "fmls v%d.4s, v%d.4s, v%d.s[%d]", d, a, b, i)
}

// sdot adds to each lane the products of four bytes with those of lane i of b.
func (n *neon) sdot(d, a, b quad128, i int) {
	n.word(0x4f80e000|element(b, i)|uint32(a)<<5|uint32(d), "sdot v%d.4s, v%d.16b, v%d.4b[%d]", d, a, b, i)
}

func (n *neon) tbl(d, table, index quad128) {
	n.word(0x4e000000|uint32(index)<<16|uint32(table)<<5|uint32(d), "tbl v%d.16b, {v%d.16b}, v%d.16b", d, table, index)
}

// Shifts of every lane of 8, 16 or 32 bits. Right by 0 is nothing.
func (n *neon) shift(name string, bits uint32, size, imm int, d, a quad128, by int) {
	lanes := map[int]string{8: "16b", 16: "8h", 32: "4s"}[size]
	n.word(bits|uint32(imm)<<16|uint32(a)<<5|uint32(d), "%s v%d.%s, v%d.%s, #%d", name, d, lanes, a, lanes, by)
}

func (n *neon) shl(size int, d, a quad128, by int) {
	n.shift("shl", 0x4f005400, size, size+by, d, a, by)
}
func (n *neon) ushr(size int, d, a quad128, by int) {
	n.shift("ushr", 0x6f000400, size, 2*size-by, d, a, by)
}
func (n *neon) sshr(size int, d, a quad128, by int) {
	n.shift("sshr", 0x4f000400, size, 2*size-by, d, a, by)
}

// sli keeps the lowest bits of each lane of 32 and sets those above to a.
func (n *neon) sli(d, a quad128, by int) { n.shift("sli", 0x6f005400, 32, 32+by, d, a, by) }

// write makes the files.
func (f *neonFile) write(table string) {
	var s strings.Builder
	s.WriteString("// Code generated by _asm. DO NOT EDIT.\n\n//go:build arm64\n\n#include \"textflag.h\"\n\n")
	for i, w := range f.floats {
		for lane := range 4 {
			fmt.Fprintf(&s, "DATA neonFloats<>+%d(SB)/4, $0x%08x\n", 16*i+4*lane, w)
		}
	}
	fmt.Fprintf(&s, "GLOBL neonFloats<>(SB), RODATA|NOPTR, $%d\n\n", 16*len(f.floats))
	for _, name := range f.order {
		for lane, w := range f.tables[name] {
			fmt.Fprintf(&s, "DATA neon%s<>+%d(SB)/4, $0x%08x\n", name, 4*lane, w)
		}
		fmt.Fprintf(&s, "GLOBL neon%s<>(SB), RODATA|NOPTR, $16\n\n", name)
	}
	s.WriteString(f.text.String())
	out := map[string]string{
		"kernels_arm64.s":        s.String(),
		"kernels_arm64.go":       "// Code generated by _asm. DO NOT EDIT.\n\n//go:build arm64\n\npackage tensor\n\n" + f.stubs.String(),
		"kernels_table_arm64.go": table,
	}
	for name, text := range out {
		if strings.HasSuffix(name, ".go") {
			text = formatted(text)
		}
		if err := os.WriteFile(name, []byte(strings.TrimRight(text, "\n")+"\n"), 0o644); err != nil {
			fail(err)
		}
	}
}
