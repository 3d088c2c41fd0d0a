package network

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"go4.org/netipx"
	"golang.org/x/sys/unix"
)

// This file holds the words in which firewall.go writes rules. A rule is the
// concatenation of clauses; each clause that does not match ends the rule.

type clause []expr.Any

// rule joins clauses.
func rule(clauses ...clause) []expr.Any {
	var out []expr.Any
	for _, c := range clauses {
		out = append(out, c...)
	}
	return out
}

func compare(op expr.CmpOp, data []byte) expr.Any {
	return &expr.Cmp{Op: op, Register: 1, Data: data}
}

func metaIs(key expr.MetaKey, op expr.CmpOp, data []byte) clause {
	return clause{&expr.Meta{Key: key, Register: 1}, compare(op, data)}
}

func fromGroup(op expr.CmpOp, group uint32) clause {
	return metaIs(expr.MetaKeyIIFGROUP, op, binaryutil.NativeEndian.PutUint32(group))
}

func toGroup(op expr.CmpOp, group uint32) clause {
	return metaIs(expr.MetaKeyOIFGROUP, op, binaryutil.NativeEndian.PutUint32(group))
}

// fromAny and toAny match devices whose name begins with prefix.
func fromAny(op expr.CmpOp, prefix string) clause {
	return metaIs(expr.MetaKeyIIFNAME, op, []byte(prefix))
}

func toAny(op expr.CmpOp, prefix string) clause {
	return metaIs(expr.MetaKeyOIFNAME, op, []byte(prefix))
}

func isIPv4() clause { return metaIs(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{unix.NFPROTO_IPV4}) }

func protocol(proto byte) clause {
	return metaIs(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{proto})
}

func toPort(port uint16) clause {
	return clause{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		compare(expr.CmpOpEq, binaryutil.BigEndian.PutUint16(port)),
	}
}

func source(register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
}

func destination(register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}
}

func toAddr(addr netip.Addr) clause {
	return clause{destination(1), compare(expr.CmpOpEq, addr.AsSlice())}
}

func fromPrefix(p netip.Prefix) clause {
	mask := ipNet(p).Mask
	return clause{source(1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		compare(expr.CmpOpEq, p.Masked().Addr().AsSlice())}
}

// state matches when the connection's state is one of bits.
func state(bits uint32) clause {
	return clause{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		compare(expr.CmpOpNeq, make([]byte, 4)),
	}
}

// reply matches packets that answer the side that opened the connection.
func reply() clause {
	return clause{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, compare(expr.CmpOpEq, []byte{1})}
}

func in(s *nftables.Set, load ...expr.Any) clause {
	return append(load, &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID})
}

// dispatch goes on in the chain that m holds for the packet's device, if any.
func dispatch(m *nftables.Set) clause {
	return clause{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: m.Name, SetID: m.ID, IsDestRegSet: true}}
}

func verdict(kind expr.VerdictKind) clause { return clause{&expr.Verdict{Kind: kind}} }

func accept() clause   { return verdict(expr.VerdictAccept) }
func drop() clause     { return verdict(expr.VerdictDrop) }
func leave() clause    { return verdict(expr.VerdictReturn) }
func resetTCP() clause { return clause{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

func prohibit() clause {
	return clause{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

func masquerade() clause { return clause{&expr.Masq{}} }

// redirect sends a new connection to an address and port of this host.
func redirect(to netip.AddrPort) clause {
	return clause{
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(to.Port())},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
	}
}

// deviceKey is a device name as the kernel compares it: 16 bytes.
func deviceKey(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func deviceAddrKey(name string, addr netip.Addr) []byte {
	return append(deviceKey(name), addr.AsSlice()...)
}

// intervals renders ranges for an interval set: each start, and the first
// address after each end.
func intervals(s *netipx.IPSet) []nftables.SetElement {
	var out []nftables.SetElement
	for _, r := range s.Ranges() {
		out = append(out, nftables.SetElement{Key: r.From().AsSlice()})
		if end := r.To().Next(); end.IsValid() && end.Is4() {
			out = append(out, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}
